/* Fake quantization, forward and backward, each in one pass over memory.
 *
 * Element by element the arithmetic is that of fake_quantize.py, operation for operation in float32,
 * so that values and gradients of x are the same bits; compile without contraction to fused
 * multiply-adds and without fast-math. Sums differ in rounding alone: lanes in float32 over a block,
 * then double over blocks, in an order that does not depend on the number of threads.
 *
 * A tensor is seen as [outer][ranges][inner], dense. qparams holds five rows of `ranges` floats:
 * scale, low, high, and the two ends (the second for affine ranges); low and high in steps of scale, as Grid has them.
 * Binary grids, -scale and scale, reach from -2 to 2 as no other does; only kernels of weights ask for that.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16
#define BLOCK 4096
#define SUMS 4
#define CHUNKS 32

typedef ptrdiff_t size;

typedef struct {
    size outer, ranges, inner;
    int32_t affine, is_weight, threads;
} shape_t;

typedef struct {
    float range_min, range_max, relative_floor, absolute_floor, probe_scale;
} bounds_t;

/* Where the range of a tensor is kept: see fake_quantize of fake_quantize.py. */
typedef struct {
    const float *multiplier, *base;
    const int32_t *quant_min, *quant_max;
} range_t;

/* Where the backward pass writes: gradients of the multiplier, shaped as that, and of the probe. */
typedef struct {
    float *multiplier, *probe;
} gradients_t;

/* What is not a number stays so: the comparisons are false for it. */
static inline float at_most(float value, float bound) { return value > bound ? bound : value; }
static inline float at_least(float value, float bound) { return value < bound ? bound : value; }

static inline float load_f32(const float *from) { return *from; }
static inline void store_f32(float *to, float value) { *to = value; }

static inline float load_bf16(const uint16_t *from) {
    union { uint32_t bits; float value; } u = {(uint32_t)*from << 16};
    return u.value;
}

static inline void store_bf16(uint16_t *to, float value) {
    union { float value; uint32_t bits; } u = {value};
    uint32_t rounded = (u.bits + 0x7fffu + ((u.bits >> 16) & 1u)) >> 16;
    *to = value == value ? (uint16_t)rounded : (uint16_t)0x7fc0;
}

/* The grid of each range, from where its ends are: ends_of and grid_of of fake_quantize.py. */
static void find_grid(const shape_t *shape, const range_t *range, const bounds_t *bounds,
                      float *qparams) {
    const float *multiplier = range->multiplier, *base = range->base;
    size n = shape->ranges;
    float low = (float)*range->quant_min, high = (float)*range->quant_max;
    if (!shape->affine && low > 0.0f) {
        high *= 2.0f;
        low = -high;
    }
    float *scales = qparams, *lows = qparams + n, *highs = qparams + 2 * n;
    float *first = qparams + 3 * n, *second = qparams + 4 * n;
    for (size r = 0; r < n; r++) {
        if (!shape->affine) {
            first[r] = multiplier[r] * base[r];
            float reach = at_least(fabsf(first[r]), bounds->range_min);
            scales[r] = at_most(reach, bounds->range_max) / at_least(high, 1.0f);
            lows[r] = low;
            highs[r] = high;
            continue;
        }
        float span = base[r] + base[n + r];
        first[r] = base[r] + (multiplier[r] - 1.0f) * span;
        second[r] = base[n + r] + (multiplier[n + r] - 1.0f) * span;
        float below = at_most(fabsf(first[r]), bounds->range_max);
        float above = at_most(fabsf(second[r]), bounds->range_max);
        float scale = at_least(below + above, bounds->range_min) / at_least(high - low, 1.0f);
        float zero_point = at_most(at_least(rintf(below / scale), low), high);
        scales[r] = scale;
        lows[r] = low - zero_point;
        highs[r] = high - zero_point;
    }
}

/* Gradients of the multipliers from sums in rows of SUMS per range: _grad_ends and range_gain; and of
 * the probe. */
static void find_gradients(const shape_t *shape, const range_t *range, const float *qparams,
                           const double *sums, const bounds_t *bounds, const gradients_t *to) {
    size n = shape->ranges;
    const float *base = range->base;
    float *grad = to->multiplier;
    double values = (double)shape->outer * (double)shape->inner, total = 0.0, squares = 0.0;
    for (size r = 0; r < n; r++) {
        total += sums[SUMS * r + 2];
        squares += sums[SUMS * r + 3];
    }
    to->probe[0] = (float)(total / (values * (double)n)) * bounds->probe_scale;
    to->probe[1] = (float)squares * bounds->probe_scale;
    const float *scales = qparams, *lows = qparams + n, *highs = qparams + 2 * n;
    const float *first = qparams + 3 * n, *second = qparams + 4 * n;
    float plain_gain = sqrtf((float)*range->quant_max / (float)values);
    float top = 0.0f;
    for (size r = 0; r < n; r++) {
        float span = shape->affine ? base[r] + base[n + r] : base[r];
        top = span > top ? span : top;
    }
    float floor = at_least(top * bounds->relative_floor, bounds->absolute_floor);
    for (size r = 0; r < n; r++) {
        float span = shape->affine ? base[r] + base[n + r] : base[r];
        float unit = span > floor ? span : floor;
        float gain = span * (shape->is_weight ? plain_gain / (unit * unit) : plain_gain);
        float of_scale = (float)sums[SUMS * r], of_clipped = (float)sums[SUMS * r + 1];
        if (!shape->affine) {
            grad[r] = of_scale / at_least(highs[r], 1.0f) * copysignf(gain, first[r]);
            continue;
        }
        float steps = at_least(highs[r] - lows[r], 1.0f);
        of_scale = of_scale + of_clipped * fabsf(first[r]) / scales[r];
        grad[r] = (of_scale / steps - of_clipped) * copysignf(gain, first[r]);
        grad[n + r] = of_scale / steps * copysignf(gain, second[r]);
    }
}

static inline int is_binary(const shape_t *shape, const float *qparams) {
    const float *lows = qparams + shape->ranges, *highs = lows + shape->ranges;
    return shape->is_weight && !shape->affine && highs[0] - lows[0] == 4.0f;
}

/* code - zero_point, as _rounded of fake_quantize.py; `binary` is a constant wherever this is called. */
static inline float nearest(float steps, int binary) {
    return binary ? copysignf(1.0f, steps + 0.0f) + steps * 0.0f : rintf(steps);
}

/* One value: code - zero_point, as to_steps has it, times scale. */
static inline float rounded(float x, float scale, float low, float high, int binary) {
    return nearest(at_least(at_most(x / scale, high), low), binary) * scale;
}

static inline float rectify(float x, float top) { return at_most(at_least(x, 0.0f), top); }

typedef struct {
    float passed; /* gradient of x */
    float slope;  /* its part of the gradient of the scale, where zero_point is held */
} backward_t;

static inline backward_t backward(float x, float given, float scale, float low, float high,
                                  int binary) {
    float value = x / scale;
    float clipped = at_least(at_most(value, high), low);
    float inside = value == clipped ? 1.0f : 0.0f;
    backward_t one = {given * inside, (nearest(clipped, binary) - clipped * inside) * given};
    return one;
}

/* The sums of a range, in this order: slope; gradients that meet clipped values; gradients; their
 * squares.
 *
 * A segment is a stretch of one range that lies together; a block is what one sum in float covers. */
static inline size blocks_of(size inner) { return (inner + BLOCK - 1) / BLOCK; }
static inline int is_segmented(const shape_t *s) { return s->ranges == 1 || s->inner >= LANES; }
static inline size least(size a, size b) { return a < b ? a : b; }

/* Adds up partial[chunk][range][block][SUMS] into sums[range][SUMS], in their order. */
static void add_up(size chunks, size ranges, size blocks, const double *partial, double *sums) {
    memset(sums, 0, sizeof(double) * (size_t)(ranges * SUMS));
    for (size chunk = 0; chunk < chunks; chunk++)
        for (size r = 0; r < ranges; r++)
            for (size b = 0; b < blocks; b++)
                for (int k = 0; k < SUMS; k++) sums[r * SUMS + k] += *partial++;
}

#define UNIT_SUMS 3

/* Units that differ in bit-width: the range of each where every multiplier is 1, and the greatest code;
 * -1 says that the codes are -1 and 1. */
typedef struct {
    const float *multiplier, *range, *high;
    int32_t by_element;
} units_t;

typedef struct {
    float scale, high;
    int binary;
} grid_t;

/* What the gain of every unit's gradient has in common: see _unit_gain of fake_quantize_units.py. */
typedef struct {
    float values, floor;
} gain_t;

static inline grid_t unit_grid(float multiplier, float range, float high, const bounds_t *bounds) {
    int binary = high < 0.0f;
    float most = binary ? 2.0f : high;
    float reach = at_least(fabsf(multiplier * range), bounds->range_min);
    grid_t grid = {at_most(reach, bounds->range_max) / at_least(most, 1.0f), most, binary};
    return grid;
}

static inline float nearest_of(float steps, int binary) {
    return binary ? nearest(steps, 1) : nearest(steps, 0);
}

static inline float on_grid(float x, grid_t grid) {
    float steps = at_least(at_most(x / grid.scale, grid.high), -grid.high);
    return nearest_of(steps, grid.binary) * grid.scale;
}

static gain_t gain_of(const shape_t *s, const units_t *units, const bounds_t *bounds) {
    size count = units->by_element ? s->outer * s->ranges * s->inner : s->ranges;
    float top = 0.0f;
    for (size u = 0; u < count; u++) top = units->range[u] > top ? units->range[u] : top;
    float floor = at_least(top * bounds->relative_floor, bounds->absolute_floor);
    gain_t gain = {(float)(s->outer * s->inner), floor};
    return gain;
}

static inline float unit_gain(float multiplier, float range, float high, const gain_t *gain) {
    float span = range > gain->floor ? range : gain->floor;
    float size = sqrtf(fabsf(high) / gain->values) / (span * span);
    return copysignf(range * size, multiplier);
}

/* Adds up sums[outer][range][UNIT_SUMS] into the gradients of the multipliers and of the probe. */
static void add_up_units(const shape_t *s, const double *sums, const bounds_t *bounds,
                         const gradients_t *to) {
    double total = 0.0, squares = 0.0;
    for (size r = 0; r < s->ranges; r++) {
        double slope = 0.0;
        for (size o = 0; o < s->outer; o++) {
            const double *part = sums + (o * s->ranges + r) * UNIT_SUMS;
            slope += part[0];
            total += part[1];
            squares += part[2];
        }
        to->multiplier[r] = (float)slope;
    }
    double values = (double)(s->outer * s->inner) * (double)s->ranges;
    to->probe[0] = (float)(total / values) * bounds->probe_scale;
    to->probe[1] = (float)squares * bounds->probe_scale;
}

#define PASTE(NAME, ELEMENT) NAME##_##ELEMENT
#define EXPAND(NAME, ELEMENT) PASTE(NAME, ELEMENT)
#define NAMED(NAME) EXPAND(NAME, ELEMENT)

#define ELEMENT f32
#define TYPE float
#include "per_element.h"
#include "rectified.h"
#include "units.h"
#undef ELEMENT
#undef TYPE

#define ELEMENT bf16
#define TYPE uint16_t
#include "per_element.h"
#include "rectified.h"
#include "units.h"
