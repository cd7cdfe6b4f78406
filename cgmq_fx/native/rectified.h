/* ReLU and fake quantization in one pass, for one type of element, as in per_element.h: one range, and
 * values are rectified to [0, top] before they are rounded, with top infinite for a plain ReLU. What is
 * read rectified beside the quantizer stands in `rectified`, its gradient in `given`; NULL where nothing
 * reads it. */

void NAMED(cgmq_rectified_forward)(const shape_t *s, const range_t *range, const bounds_t *bounds,
                                   float *qparams, const TYPE *restrict x, TYPE *restrict out,
                                   TYPE *restrict rectified, const float *top) {
    find_grid(s, range, bounds, qparams);
    float scale = qparams[0], low = qparams[1], high = qparams[2], end = *top;
    size blocks = blocks_of(s->inner);
    #pragma omp parallel for num_threads(s->threads) if (s->threads > 1) schedule(static)
    for (size block = 0; block < blocks; block++) {
        size first = block * BLOCK, last = first + least(BLOCK, s->inner - first);
        if (rectified != NULL)
            for (size i = first; i < last; i++)
                NAMED(store)(rectified + i, rectify(NAMED(load)(x + i), end));
        for (size i = first; i < last; i++)
            NAMED(store)(out + i, rounded(rectify(NAMED(load)(x + i), end), scale, low, high, 0));
    }
}

/* What came through the quantizer, and what came beside it: added up in TYPE, as autograd does. */
static inline float NAMED(sum_of)(float passed, const TYPE *given) {
    TYPE kept;
    NAMED(store)(&kept, passed);
    return NAMED(load)(&kept) + NAMED(load)(given);
}

/* The first `width` values, a constant wherever this is called for most of them. */
static inline void NAMED(rectified_lanes)(const TYPE *restrict x, const TYPE *restrict grad,
                                          const TYPE *restrict given, TYPE *restrict grad_x,
                                          size width, float scale, float low, float high, float top,
                                          float (*restrict lanes)[LANES]) {
    for (size j = 0; j < width; j++) {
        float value = rectify(NAMED(load)(x + j), top), came = NAMED(load)(grad + j);
        backward_t one = backward(value, came, scale, low, high, 0);
        float sum = given == NULL ? one.passed : NAMED(sum_of)(one.passed, given + j);
        /* As torch has it: no number passes a ReLU, and not one with a top. */
        float beyond = isinf(top) ? sum : 0.0f;
        sum = value < top ? sum : beyond;
        NAMED(store)(grad_x + j, value <= 0.0f ? 0.0f : sum);
        lanes[0][j] += one.slope;
        lanes[1][j] += came - one.passed;
        lanes[2][j] += came;
        lanes[3][j] += came * came;
    }
}

static void NAMED(rectified_block)(const TYPE *restrict x, const TYPE *restrict grad,
                                   const TYPE *restrict given, TYPE *restrict grad_x, size count,
                                   const float *qparams, float top, double *sums) {
    float scale = qparams[0], low = qparams[1], high = qparams[2];
    float lanes[SUMS][LANES] = {{0}};
    size whole = count - count % LANES;
    if (given == NULL)
        for (size i = 0; i < whole; i += LANES)
            NAMED(rectified_lanes)(x + i, grad + i, NULL, grad_x + i, LANES, scale, low, high, top, lanes);
    else
        for (size i = 0; i < whole; i += LANES)
            NAMED(rectified_lanes)(x + i, grad + i, given + i, grad_x + i, LANES, scale, low, high, top, lanes);
    NAMED(rectified_lanes)(x + whole, grad + whole, given == NULL ? NULL : given + whole,
                           grad_x + whole, count - whole, scale, low, high, top, lanes);
    for (int k = 0; k < SUMS; k++) {
        sums[k] = 0.0;
        for (int j = 0; j < LANES; j++) sums[k] += lanes[k][j];
    }
}

/* As cgmq_backward. */
int NAMED(cgmq_rectified_backward)(const shape_t *s, const range_t *range, const bounds_t *bounds,
                                   const float *qparams, const TYPE *x, const TYPE *grad,
                                   TYPE *grad_x, const gradients_t *gradients, const TYPE *given,
                                   const float *top) {
    size blocks = blocks_of(s->inner);
    double sums[SUMS], *partial = malloc(sizeof(double) * (size_t)(blocks * SUMS));
    if (partial == NULL) return 1;
    #pragma omp parallel for num_threads(s->threads) if (s->threads > 1) schedule(static)
    for (size block = 0; block < blocks; block++) {
        size at = block * BLOCK;
        NAMED(rectified_block)(x + at, grad + at, given == NULL ? NULL : given + at, grad_x + at,
                               least(BLOCK, s->inner - at), qparams, *top, partial + block * SUMS);
    }
    add_up(1, 1, blocks, partial, sums);
    find_gradients(s, range, qparams, sums, bounds, gradients);
    free(partial);
    return 0;
}
