/* The forward pass of one token, for a few rows at once.

   Generation reads every weight once per token and computes little with it: the memory's speed is
   the limit. What helps is prefetching (a core by itself asks for too little ahead of time), and
   no pause between two matrices.

   WEIGHT: the type of the weights (n, k): float, uint16_t for bfloat16, or int8_t with a scale per
   row. CACHE: the type of keys and values. Everything else is float32. A row's result does not
   depend on the rows beside it.

   B: rows. C: channels. H: heads. D: head size. k, n: inputs and outputs of a linear layer. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define AHEAD 8192          /* bytes to prefetch ahead: the fastest of those tried */
#define LANES 64            /* products that are summed at the same time */
#define ALONE (1 << 18)     /* so many products are done before a second thread has woken up */
#define INLINE static inline __attribute__((always_inline))

INLINE float from_float(float v) { return v; }
INLINE float from_int8_t(int8_t v) { return v; }
INLINE float from_uint16_t(uint16_t v)
{
    uint32_t bits = (uint32_t)v << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
INLINE float to_float(float v) { return v; }
INLINE uint16_t to_uint16_t(float v)
{
    uint32_t bits;
    memcpy(&bits, &v, 4);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;    /* round to nearest, ties to even */
}
#define JOIN(a, b) a##b
#define FROM(type) JOIN(from_, type)
#define TO(type) JOIN(to_, type)

/* prefetch `bytes` that lie `ahead` bytes after `from` */
INLINE void prefetch(const void *from, long bytes, long ahead)
{
    for (long i = 0; i < bytes; i += 64)
        __builtin_prefetch((const char *)from + ahead + i);
}

/* dot products of one row of weights with `rows` rows of x (at most 4): y (rows) */
INLINE void dots(const WEIGHT *w, const float *x, long k, int rows, float *y)
{
    float sum[4][LANES] = {{0}};
    long j = 0;
    for (; j + LANES <= k; j += LANES) {
        prefetch(w + j, LANES * sizeof(WEIGHT), AHEAD);
        #pragma omp simd
        for (long u = 0; u < LANES; u++) {
            float weight = FROM(WEIGHT)(w[j + u]);
            for (int b = 0; b < rows; b++)
                sum[b][u] += weight * x[b * k + j + u];
        }
    }
    for (int b = 0; b < rows; b++) {
        for (long u = j; u < k; u++)
            sum[b][u - j] += FROM(WEIGHT)(w[u]) * x[b * k + u];
        float total = 0;
        for (int u = 0; u < LANES; u++)
            total += sum[b][u];
        y[b] = total;
    }
}

/* x (B, k) -> y (B, n), or added to y if `accumulate`; the threads share the outputs.
   matrix: weights (n, k), scale (n) or null, bias (n) or null */
static void multiply(void **matrix, const float *x, float *y, long B, long n, long k,
                     int accumulate)
{
    const WEIGHT *w = matrix[0];
    const float *scale = matrix[1], *bias = matrix[2];
    #pragma omp for schedule(static)
    for (long i = 0; i < n; i++)
        for (long b = 0; b < B;) {
            float sums[4];
            /* Four rows at a time, or one by one if there are fewer. The last four may overlap
               with those before them: `done` of them are computed already. */
            int rows = B < 4 ? 1 : 4;
            int done = b + rows > B ? b + rows - B : 0;
            if (rows == 1)
                dots(w + i * k, x + b * k, k, 1, sums);
            else
                dots(w + i * k, x + (b - done) * k, k, 4, sums);
            for (int r = done; r < rows; r++, b++)
                y[b * n + i] = sums[r] * (scale ? scale[i] : 1) + (bias ? bias[i] : 0)
                               + (accumulate ? y[b * n + i] : 0);
        }
}

/* LayerNorm: each thread computes all of it, which is faster than waiting for another.
   layer: weight (C), unused, bias (C) or null */
static void norm(void **layer, const float *x, float *y, long B, long C, float eps)
{
    const float *weight = layer[0], *bias = layer[2];
    for (long b = 0; b < B; b++) {
        float mean = 0, square = 0;
        for (long i = b * C; i < (b + 1) * C; i++)
            mean += x[i];
        mean /= C;
        for (long i = b * C; i < (b + 1) * C; i++)
            square += (x[i] - mean) * (x[i] - mean);
        float scale = 1 / sqrtf(square / C + eps);
        for (long i = 0; i < C; i++)
            y[b * C + i] = (x[b * C + i] - mean) * scale * weight[i] + (bias ? bias[i] : 0);
    }
}

/* e to the power x, with a relative error of 2e-7, in a form that compilers can vectorize */
INLINE float fast_exp(float x)
{
    x = x < -60 ? -60 : x > 60 ? 60 : x;
    /* x = n ln 2 + r, with ln 2 as the difference of two numbers, for precision */
    float n = rintf(x * 1.44269504f), r = x - n * 0.693359375f + n * 2.12194440e-4f, power;
    int32_t bits = ((int32_t)n + 127) << 23;
    memcpy(&power, &bits, 4);
    return power * (1 + r * (1 + r * (1 / 2.f + r * (1 / 6.f + r * (1 / 24.f
                    + r * (1 / 120.f + r / 720))))));
}

/* Attention of one token per row, in column `at` of the cache: stores its k and v in the cache
   (B, H, length, D) and writes what its q attends to into y (B, H, D).
   qkv: (B, 3, H, D). first: the column where each row begins (B), or null if all begin at 0 */
static void attend(const float *qkv, CACHE *k, CACHE *v, const int64_t *first, float *y,
                   long B, long H, long D, long length, long at)
{
    #pragma omp for collapse(2)
    for (long b = 0; b < B; b++)
        for (long h = 0; h < H; h++) {
            const float *q = qkv + (3 * b * H + h) * D;
            CACHE *keys = k + (b * H + h) * length * D, *values = v + (b * H + h) * length * D;
            long from = first ? first[b] : 0;
            float weight[at + 1], most = -1e30f, sum = 0, *out = y + (b * H + h) * D;
            for (long d = 0; d < D; d++) {
                keys[at * D + d] = TO(CACHE)(q[H * D + d]);
                values[at * D + d] = TO(CACHE)(q[2 * H * D + d]);
                out[d] = 0;
            }
            for (long t = from; t <= at; t++) {
                float dot = 0;
                prefetch(keys + t * D, D * sizeof(CACHE), AHEAD / 4);
                for (long d = 0; d < D; d++)
                    dot += q[d] * FROM(CACHE)(keys[t * D + d]);
                weight[t] = dot / sqrtf(D);
                most = fmaxf(most, weight[t]);
            }
            for (long t = from; t <= at; t++)
                sum += weight[t] = fast_exp(weight[t] - most);
            for (long t = from; t <= at; t++) {
                float share = weight[t] / sum;
                prefetch(values + t * D, D * sizeof(CACHE), AHEAD / 4);
                for (long d = 0; d < D; d++)
                    out[d] += share * FROM(CACHE)(values[t * D + d]);
            }
        }
}

enum {EXACT, TANH, RELU};      /* GELU by erf, GELU by tanh, ReLU */

static void activate(float *x, long n, int activation)
{
    if (activation == TANH) {
        #pragma omp for simd schedule(static)
        for (long i = 0; i < n; i++)
            x[i] /= 1 + fast_exp(-1.59576912f * (x[i] + 0.044715f * x[i] * x[i] * x[i]));
    } else if (activation == RELU) {
        #pragma omp for simd schedule(static)
        for (long i = 0; i < n; i++)
            x[i] = x[i] > 0 ? x[i] : 0;
    } else {
        #pragma omp for schedule(static)
        for (long i = 0; i < n; i++)
            x[i] *= 0.5f * (1 + erff(x[i] * 0.70710678f));
    }
}

/* A linear layer, as `multiply`. */
void product(void **matrix, const float *x, float *y, long B, long n, long k)
{
    #pragma omp parallel if (B * n * k > ALONE)
    multiply(matrix, x, y, B, n, k, 0);
}

/* All blocks of a GPT-2, in place on x (B, C).
   layers: for each block (weight, scale, bias) of ln_1, c_attn, c_proj, ln_2, c_fc and c_proj.
   kv: for each block the cache's k and v. F: the MLP's hidden channels.
   space: room for B (C + max(3 C, F)) floats. length, at, first: as in `attend` */
void blocks(void **layers, long n_layer, float *x, void **kv, const int64_t *first, float *space,
            long B, long C, long H, long F, long length, long at, long activation, float eps)
{
    float *attended = space, *wide = space + B * C;
    #pragma omp parallel if (B * C * (4 * C + 2 * F) > ALONE)
    for (long i = 0; i < n_layer; i++) {
        void **w = layers + 18 * i;
        float normed[B * C];
        norm(w, x, normed, B, C, eps);
        multiply(w + 3, normed, wide, B, 3 * C, C, 0);
        attend(wide, kv[2 * i], kv[2 * i + 1], first, attended, B, H, C / H, length, at);
        multiply(w + 6, attended, x, B, C, C, 1);
        norm(w + 9, x, normed, B, C, eps);
        multiply(w + 12, normed, wide, B, F, C, 0);
        activate(wide, B * F, activation);
        multiply(w + 15, wide, x, B, C, F, 1);
    }
}
