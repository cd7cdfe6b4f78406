/* Weights whose channels or elements differ in bit-width, for one type of element, as in per_element.h.
 * The arithmetic is that of fake_quantize_units.py. A tensor is seen as [outer][ranges][inner], dense; a
 * unit is a range, or, where units->by_element is set, an element. */

/* Writes each unit on its grid to out. */
void NAMED(cgmq_units_forward)(const shape_t *s, const units_t *units, const bounds_t *bounds,
                               const TYPE *restrict x, TYPE *restrict out) {
    #pragma omp parallel for num_threads(s->threads) if (s->threads > 1) schedule(static)
    for (size item = 0; item < s->outer * s->ranges; item++) {
        size r = item % s->ranges, at = item * s->inner;
        float multiplier = units->multiplier[r];
        if (units->by_element) {
            for (size i = at; i < at + s->inner; i++) {
                grid_t grid = unit_grid(multiplier, units->range[i], units->high[i], bounds);
                NAMED(store)(out + i, on_grid(NAMED(load)(x + i), grid));
            }
            continue;
        }
        grid_t grid = unit_grid(multiplier, units->range[r], units->high[r], bounds);
        for (size i = at; i < at + s->inner; i++)
            NAMED(store)(out + i, on_grid(NAMED(load)(x + i), grid));
    }
}

static inline void NAMED(unit_lane)(const TYPE *x, const TYPE *grad, TYPE *grad_x, float multiplier,
                                    float range, float high, const bounds_t *bounds,
                                    const gain_t *gain, float *sums, int stride) {
    float given = NAMED(load)(grad);
    grid_t grid = unit_grid(multiplier, range, high, bounds);
    float value = NAMED(load)(x) / grid.scale;
    float clipped = at_least(at_most(value, grid.high), -grid.high);
    float inside = value == clipped ? 1.0f : 0.0f;
    NAMED(store)(grad_x, given * inside);
    float slope = (nearest_of(clipped, grid.binary) - clipped * inside) * given;
    sums[0] += slope / at_least(grid.high, 1.0f) * unit_gain(multiplier, range, high, gain);
    sums[stride] += given;
    sums[2 * stride] += given * given;
}

/* Writes the gradient of x and adds up the others. Returns 0, or 1 where there is no memory. */
int NAMED(cgmq_units_backward)(const shape_t *s, const units_t *units, const bounds_t *bounds,
                               const TYPE *restrict x, const TYPE *restrict grad,
                               TYPE *restrict grad_x, const gradients_t *to) {
    size items = s->outer * s->ranges;
    double *sums = calloc((size_t)items * UNIT_SUMS, sizeof(double));
    if (sums == NULL) return 1;
    gain_t gain = gain_of(s, units, bounds);
    #pragma omp parallel for num_threads(s->threads) if (s->threads > 1) schedule(static)
    for (size item = 0; item < items; item++) {
        size r = item % s->ranges, at = item * s->inner, end = at + s->inner;
        float multiplier = units->multiplier[r];
        for (size start = at; start < end; start += BLOCK) {
            float lanes[UNIT_SUMS][LANES] = {{0}};
            size stop = start + least(BLOCK, end - start), i = start;
            for (; i + LANES <= stop; i += LANES)
                for (int j = 0; j < LANES; j++) {
                    size u = units->by_element ? i + j : r;
                    NAMED(unit_lane)(x + i + j, grad + i + j, grad_x + i + j, multiplier,
                                     units->range[u], units->high[u], bounds, &gain,
                                     &lanes[0][j], LANES);
                }
            for (; i < stop; i++) {
                size u = units->by_element ? i : r;
                NAMED(unit_lane)(x + i, grad + i, grad_x + i, multiplier, units->range[u],
                                 units->high[u], bounds, &gain, &lanes[0][0], LANES);
            }
            for (int k = 0; k < UNIT_SUMS; k++)
                for (int j = 0; j < LANES; j++) sums[item * UNIT_SUMS + k] += lanes[k][j];
        }
    }
    add_up_units(s, sums, bounds, to);
    free(sums);
    return 0;
}
