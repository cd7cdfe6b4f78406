/* The kernels for one type of element: fake_quantize.c includes this once for each, with ELEMENT (its
 * name in the kernels' names) and TYPE (how it lies in memory) defined. */

/* Writes the grid of each range to qparams, and x on it to out. */
void NAMED(cgmq_forward)(const shape_t *s, const range_t *range, const bounds_t *bounds,
                         float *qparams, const TYPE *restrict x, TYPE *restrict out) {
    find_grid(s, range, bounds, qparams);
    const float *scales = qparams, *lows = qparams + s->ranges, *highs = lows + s->ranges;
    int is_segment = is_segmented(s), binary = is_binary(s, qparams);
    size blocks = is_segment ? blocks_of(s->inner) : 1;
    size items = is_segment ? s->outer * s->ranges * blocks : s->outer;
    #pragma omp parallel for num_threads(s->threads) if (s->threads > 1) schedule(static)
    for (size item = 0; item < items; item++) {
        if (is_segment) {
            size r = item / blocks % s->ranges, start = item % blocks * BLOCK;
            size at = item / blocks * s->inner + start;
            size count = least(BLOCK, s->inner - start);
            float scale = scales[r], low = lows[r], high = highs[r];
            if (binary)
                for (size i = at; i < at + count; i++)
                    NAMED(store)(out + i, rounded(NAMED(load)(x + i), scale, low, high, 1));
            else
                for (size i = at; i < at + count; i++)
                    NAMED(store)(out + i, rounded(NAMED(load)(x + i), scale, low, high, 0));
            continue;
        }
        for (size r = 0; r < s->ranges; r++)
            for (size i = 0; i < s->inner; i++) {
                size at = (item * s->ranges + r) * s->inner + i;
                float value = NAMED(load)(x + at);
                NAMED(store)(out + at, rounded(value, scales[r], lows[r], highs[r], binary));
            }
    }
}

/* Adds the sums of a few values to `sums`. */
static inline void NAMED(few)(const TYPE *restrict x, const TYPE *restrict grad,
                              TYPE *restrict grad_x, size count, float scale, float low,
                              float high, int binary, double *sums) {
    for (size i = 0; i < count; i++) {
        float given = NAMED(load)(grad + i);
        backward_t one = backward(NAMED(load)(x + i), given, scale, low, high, binary);
        NAMED(store)(grad_x + i, one.passed);
        sums[0] += one.slope;
        sums[1] += given - one.passed;
        sums[2] += given;
        sums[3] += given * given;
    }
}

static inline void NAMED(block)(const TYPE *restrict x, const TYPE *restrict grad,
                                TYPE *restrict grad_x, size count, float scale, float low,
                                float high, int binary, double *sums) {
    float lanes[SUMS][LANES] = {{0}};
    size i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int j = 0; j < LANES; j++) {
            float given = NAMED(load)(grad + i + j);
            backward_t one = backward(NAMED(load)(x + i + j), given, scale, low, high, binary);
            NAMED(store)(grad_x + i + j, one.passed);
            lanes[0][j] += one.slope;
            lanes[1][j] += given - one.passed;
            lanes[2][j] += given;
            lanes[3][j] += given * given;
        }
    for (int k = 0; k < SUMS; k++) {
        sums[k] = 0.0;
        for (int j = 0; j < LANES; j++) sums[k] += lanes[k][j];
    }
    NAMED(few)(x + i, grad + i, grad_x + i, count - i, scale, low, high, binary, sums);
}

/* Ranges with few values side by side: chunks of the outer axis, each with sums of its own. */
static void NAMED(interleaved)(const shape_t *s, const TYPE *restrict x, const TYPE *restrict grad,
                               TYPE *restrict grad_x, const float *qparams, size chunks,
                               double *partial) {
    const float *scales = qparams, *lows = qparams + s->ranges, *highs = lows + s->ranges;
    memset(partial, 0, sizeof(double) * (size_t)(chunks * s->ranges * SUMS));
    #pragma omp parallel for num_threads(s->threads) if (s->threads > 1) schedule(static)
    for (size chunk = 0; chunk < chunks; chunk++)
        for (size o = chunk * s->outer / chunks; o < (chunk + 1) * s->outer / chunks; o++)
            for (size r = 0; r < s->ranges; r++) {
                size at = (o * s->ranges + r) * s->inner;
                NAMED(few)(x + at, grad + at, grad_x + at, s->inner, scales[r], lows[r], highs[r],
                           is_binary(s, qparams), partial + (chunk * s->ranges + r) * SUMS);
            }
}

static void NAMED(segmented)(const shape_t *s, const TYPE *restrict x, const TYPE *restrict grad,
                             TYPE *restrict grad_x, const float *qparams, size blocks,
                             double *partial) {
    const float *scales = qparams, *lows = qparams + s->ranges, *highs = lows + s->ranges;
    size items = s->outer * s->ranges * blocks;
    int binary = is_binary(s, qparams);
    #pragma omp parallel for num_threads(s->threads) if (s->threads > 1) schedule(static)
    for (size item = 0; item < items; item++) {
        size r = item / blocks % s->ranges, start = item % blocks * BLOCK;
        size at = item / blocks * s->inner + start;
        size count = least(BLOCK, s->inner - start);
        double *sums = partial + item * SUMS;
        if (binary)
            NAMED(block)(x + at, grad + at, grad_x + at, count, scales[r], lows[r], highs[r], 1, sums);
        else
            NAMED(block)(x + at, grad + at, grad_x + at, count, scales[r], lows[r], highs[r], 0, sums);
    }
}

/* Writes the gradients. Returns 0, or 1 where there is no memory. */
int NAMED(cgmq_backward)(const shape_t *s, const range_t *range, const bounds_t *bounds,
                         const float *qparams, const TYPE *restrict x, const TYPE *restrict grad,
                         TYPE *restrict grad_x, const gradients_t *gradients) {
    int is_segment = is_segmented(s);
    size chunks = is_segment ? s->outer : least(s->outer, CHUNKS);
    size blocks = is_segment ? blocks_of(s->inner) : 1;
    double *sums = malloc(sizeof(double) * (size_t)((chunks * blocks + 1) * s->ranges * SUMS));
    if (sums == NULL) return 1;
    double *partial = sums + s->ranges * SUMS;
    if (is_segment)
        NAMED(segmented)(s, x, grad, grad_x, qparams, blocks, partial);
    else
        NAMED(interleaved)(s, x, grad, grad_x, qparams, chunks, partial);
    add_up(chunks, s->ranges, blocks, partial, sums);
    find_gradients(s, range, qparams, sums, bounds, gradients);
    free(sums);
    return 0;
}
