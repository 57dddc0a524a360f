/* Passes over fp32 activations on CPU, each of which reads and writes a row once.

   compiled_cpu.py compiles and calls them, and says what the arguments are. torch computes what
   decides which neurons are kept, SiLU, so that masks are the same to the last bit as without these.
   Rows are independent of one another and of the number of threads; so are the sums over rows, which
   are made in one order. */

#include <math.h>
#include <stdint.h>
#include <string.h>

/* Divisors are not smaller, as in reference.py. */
#define TINY 1.17549435e-38f
/* Rows whose sum is made by itself; the sums of all such runs are then added up. */
#define RUN 64
/* Numbers of the widest registers: loops over so many at a time need no slow rest. */
#define LANES 16
/* Experts of a token, at most (few_largest.py). */
#define MOST_LARGEST 16

/* BLAS's matrix product, of matrices stored column after column: torch's own, given by its address. */
typedef void gemm(
    const char *, const char *, const int *, const int *, const int *, const float *, const float *,
    const int *, const float *, const int *, const float *, float *, const int *);

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* Returns how many of n numbers are at least `least`. */
static int32_t count_from(const int32_t *bits, int64_t n, int32_t least)
{
    int32_t count = 0;
#pragma omp simd reduction(+ : count)
    for (int64_t j = 0; j < n; j++)
        count += bits[j] >= least;
    return count;
}

/* Writes 1 at the k largest |values| of a row and 0 elsewhere, ties to the lowest index; a row that
   holds a NaN has no largest. Floats without signs are in the order of their bits, so the k-th is
   searched for between two numbers: where a straight line between their counts puts it, and every
   third time in the middle, which ends the search whatever the row is. */
static void select_row(const float *values, int64_t n, int64_t k, int32_t *bits, uint8_t *mask)
{
    int32_t largest = 0;
    memcpy(bits, values, n * sizeof(float));
#pragma omp simd reduction(max : largest)
    for (int64_t j = 0; j < n; j++) {
        bits[j] &= INT32_MAX;
        largest = bits[j] > largest ? bits[j] : largest;
    }
    if (largest > 0x7f800000) { /* above infinity are the NaNs */
        memset(mask, 0, n);
        return;
    }
    /* At least k are from `low` on and fewer from `high` on. */
    int32_t low = 0, high = largest + 1;
    int64_t from_low = n, from_high = 0;
    int32_t middle = largest - (8 << 23); /* the k-th is rarely 2^8 times smaller than the largest */
    for (int turn = middle > 0 ? 0 : 1; from_low != k && high - low > 1; turn++) {
        if (turn > 0) {
            int64_t width = (int64_t)high - low;
            int64_t step = width / 2;
            if (turn % 3)
                step = (int64_t)((double)width * (from_low - k) / (from_low - from_high));
            step = step < 1 ? 1 : step > width - 1 ? width - 1 : step;
            middle = (int32_t)(low + step);
        }
        int64_t count = count_from(bits, n, middle);
        if (count >= k) {
            low = middle;
            from_low = count;
        } else {
            high = middle;
            from_high = count;
        }
    }
#pragma omp simd
    for (int64_t j = 0; j < n; j++)
        mask[j] = bits[j] >= low;
    for (int64_t j = n - 1; from_low > k; j--) /* ties: the last ones go */
        if (bits[j] == low) {
            mask[j] = 0;
            from_low--;
        }
}

/* Of rows [T, F]: activation (in: of all neurons) times the mask, and hidden = activation * up *
   scale. With k > 0 the mask is chosen and written, else it is read where there is one. inverse_T,
   where it is wanted: 1 / the sum of a row's |activation|. */
void glu_forward(
    int64_t rows, int64_t n, int64_t k, const float *up, int64_t up_stride, float *activation,
    const float *scale, uint8_t *mask, float *hidden, float *inverse, int threads)
{
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < rows; t++) {
        float *a = activation + t * n, *h = hidden + t * n;
        const float *u = up + t * up_stride;
        uint8_t *m = mask ? mask + t * n : 0;
        float factor = scale ? scale[t] : 1.0f, sum = 0.0f;
        if (k > 0) /* hidden is not written yet: room for the numbers that are searched */
            select_row(a, n, k, (int32_t *)h, m);
        if (m)
#pragma omp simd
            for (int64_t j = 0; j < n; j++) /* times 0, so that NaN spreads */
                a[j] *= (float)m[j];
#pragma omp simd
        for (int64_t j = 0; j < n; j++)
            h[j] = a[j] * u[j] * factor;
        if (inverse) {
#pragma omp simd reduction(+ : sum)
            for (int64_t j = 0; j < n; j++)
                sum += fabsf(a[j]);
            inverse[t] = 1.0f / (sum < TINY ? TINY : sum);
        }
    }
}

/* Adds each row's mask, and its |activation| times inverse_T, to its segment's sums [S, F]; without
   `segment` all rows are of one. */
void glu_sums(
    int64_t rows, int64_t n, const float *activation, const uint8_t *mask, const float *inverse,
    const int64_t *segment, float *kept, float *weight, int threads)
{
    int64_t width = (n + threads - 1) / threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t first = 0; first < n; first += width) {
        int64_t end = smaller(first + width, n);
        for (int64_t t = 0; t < rows; t++) {
            const float *a = activation + t * n;
            const uint8_t *m = mask + t * n;
            int64_t at = segment ? segment[t] * n : 0;
            float *of_kept = kept + at, *of_weight = weight + at;
            float factor = inverse ? inverse[t] : 1.0f;
#pragma omp simd
            for (int64_t j = first; j < end; j++) {
                of_kept[j] += (float)m[j];
                of_weight[j] += fabsf(a[j]) * factor;
            }
        }
    }
}

/* The gradients of gate, up and scale from those of hidden values, and of each segment's sums of
   weights where there are any; without `segment` all rows are of one. `activation` is masked. The
   hidden values are computed again where there is room for them. With w the weights of a row, s
   their sum and c the gradients of the segment's sums, d/dw_j of sum_k c_k w_k / s is
   (c_j - sum_k c_k w_k / s) / s; the second term is zero where s is clamped. SiLU's slope is taken
   from its value. */
void glu_backward(
    int64_t rows, int64_t n, const float *gate, int64_t gate_stride, const float *up,
    int64_t up_stride, const float *activation, const uint8_t *mask, const float *scale,
    const float *grad, int64_t grad_stride, const float *grad_sums, const int64_t *segment,
    const float *inverse, float *grad_gate, float *grad_up, int64_t out_stride, float *grad_scale,
    float *hidden, int threads)
{
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < rows; t++) {
        const float *g = gate + t * gate_stride, *u = up + t * up_stride, *a = activation + t * n;
        const float *d = grad + t * grad_stride;
        float *into_gate = grad_gate + t * out_stride, *into_up = grad_up + t * out_stride;
        float factor = scale ? scale[t] : 1.0f, of_scale = 0.0f;
#pragma omp simd reduction(+ : of_scale)
        for (int64_t j = 0; j < n; j++) {
            float of_activation = d[j] * u[j];
            of_scale += of_activation * a[j];
            into_gate[j] = of_activation * factor;
            into_up[j] = d[j] * a[j] * factor;
        }
        if (grad_scale)
            grad_scale[t] = of_scale;
        if (hidden)
#pragma omp simd
            for (int64_t j = 0; j < n; j++)
                hidden[t * n + j] = a[j] * u[j] * factor;
        if (grad_sums) {
            const float *c = grad_sums + (segment ? segment[t] * n : 0);
            float mean = 0.0f, one_over = 1.0f;
            if (inverse) {
                one_over = inverse[t];
#pragma omp simd reduction(+ : mean)
                for (int64_t j = 0; j < n; j++)
                    mean += c[j] * fabsf(a[j]);
                mean = one_over < 1.0f / TINY ? mean * one_over : mean * 0.0f;
            }
#pragma omp simd
            for (int64_t j = 0; j < n; j++) {
                float sign = (float)(a[j] > 0.0f) - (float)(a[j] < 0.0f);
                into_gate[j] += sign * (c[j] - mean) * one_over;
            }
        }
        if (mask) {
            const uint8_t *m = mask + t * n;
#pragma omp simd
            for (int64_t j = 0; j < n; j++)
                into_gate[j] *= (float)m[j];
        }
#pragma omp simd
        for (int64_t j = 0; j < n; j++) {
            float share = g[j] == 0.0f ? 0.5f : a[j] / g[j]; /* the sigmoid of the gate */
            into_gate[j] *= share * (1.0f + g[j] * (1.0f - share));
        }
    }
}

/* RMSNorm of rows [R, n], which are `inner` at a time `inner_stride` apart and those `outer_stride`.
   inverse_R is saved: 1 / sqrt(mean square + eps), or no number where squares overflow. */
void rms_norm_forward(
    int64_t rows, int64_t n, int64_t inner, int64_t inner_stride, int64_t outer_stride,
    const float *x, const float *weight, float eps, float *out, float *inverse, int threads)
{
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t r = 0; r < rows; r++) {
        const float *from = x + r / inner * outer_stride + r % inner * inner_stride;
        float *into = out + r * n, squares = 0.0f;
#pragma omp simd reduction(+ : squares)
        for (int64_t j = 0; j < n; j++)
            squares += from[j] * from[j];
        float scale = 1.0f / sqrtf(squares / (float)n + eps);
#pragma omp simd
        for (int64_t j = 0; j < n; j++)
            into[j] = from[j] * scale * weight[j];
        inverse[r] = scale * (scale / scale);
    }
}

/* The gradients of x, written as [R, n], and of the weight: `parts` holds a row of n for each run. */
void rms_norm_backward(
    int64_t rows, int64_t n, int64_t inner, int64_t inner_stride, int64_t outer_stride,
    const float *x, const float *weight, const float *inverse, const float *grad,
    int64_t grad_inner_stride, int64_t grad_outer_stride, float *grad_x, float *parts,
    float *grad_weight, int threads)
{
    int64_t runs = (rows + RUN - 1) / RUN;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t run = 0; run < runs; run++) {
        float *part = parts + run * n;
        memset(part, 0, n * sizeof(float));
        for (int64_t r = run * RUN; r < smaller(run * RUN + RUN, rows); r++) {
            const float *from = x + r / inner * outer_stride + r % inner * inner_stride;
            const float *d = grad + r / inner * grad_outer_stride + r % inner * grad_inner_stride;
            float *into = grad_x + r * n, scale = inverse[r], dot = 0.0f;
#pragma omp simd reduction(+ : dot)
            for (int64_t j = 0; j < n; j++) {
                float normed = from[j] * scale;
                float product = d[j] * normed;
                part[j] += product;
                dot += product * weight[j];
            }
            float mean = dot / (float)n * scale;
#pragma omp simd
            for (int64_t j = 0; j < n; j++)
                into[j] = (d[j] * weight[j] - from[j] * mean) * scale;
        }
    }
    memset(grad_weight, 0, n * sizeof(float));
    for (int64_t run = 0; run < runs; run++)
#pragma omp simd
        for (int64_t j = 0; j < n; j++)
            grad_weight[j] += parts[run * n + j];
}

/* Rotates heads [S, B, N, D] by their positions: in the first half x cos - sign * (second half)
   sin_a, in the second x cos + sign * (first half) sin_b. Each tensor has three strides; sines have
   those of cosines. */
void rotate(
    int64_t length, int64_t batch, int64_t heads, int64_t width, const float *x, int64_t x_s,
    int64_t x_b, int64_t x_n, const float *cos, const float *sin_a, const float *sin_b, int64_t cos_s,
    int64_t cos_b, int64_t cos_n, float sign, float *out, int threads)
{
    int64_t half = width / 2;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t head = 0; head < length * batch * heads; head++) {
        int64_t n = head % heads, b = head / heads % batch, s = head / heads / batch;
        int64_t angle = s * cos_s + b * cos_b + n * cos_n;
        const float *first = x + s * x_s + b * x_b + n * x_n, *second = first + half;
        const float *c = cos + angle, *a = sin_a + angle, *z = sin_b + angle;
        float *into = out + head * width;
#pragma omp simd
        for (int64_t j = 0; j < half; j++) {
            into[j] = first[j] * c[j] - sign * (second[j] * a[j]);
            into[half + j] = second[j] * c[half + j] + sign * (first[j] * z[j]);
        }
    }
}

/* Counts the rows of each expert, and says where each token's rows begin in their order. Returns how
   many there are. `chosen` is [N, A], 0 or 1. */
int64_t count_rows(
    int64_t tokens, int64_t experts, const uint8_t *chosen, int64_t *rows_of_expert, int64_t *first)
{
    int64_t all = 0;
    memset(rows_of_expert, 0, experts * sizeof(int64_t));
    for (int64_t t = 0; t < tokens; t++) {
        first[t] = all;
        for (int64_t e = 0; e < experts; e++) {
            rows_of_expert[e] += chosen[t * experts + e];
            all += chosen[t * experts + e];
        }
    }
    return all;
}

/* Sorts rows by expert, those of one by token: of each its token and its place in [N, A], and the
   rows of each token in the order of experts. `next` is room for a number of each expert. */
void order_rows(
    int64_t tokens, int64_t experts, const uint8_t *chosen, const int64_t *rows_of_expert,
    int64_t *next, int64_t *token, int64_t *place, int64_t *row)
{
    int64_t begin = 0;
    for (int64_t e = 0; e < experts; e++) {
        next[e] = begin;
        begin += rows_of_expert[e];
    }
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t e = 0; e < experts; e++)
            if (chosen[t * experts + e]) {
                int64_t r = next[e]++;
                token[r] = t;
                place[r] = t * experts + e;
                *row++ = r;
            }
}

/* Copies rows [T, n] from where `from` says. */
void copy_rows(
    int64_t rows, int64_t n, const int64_t *from, const float *source, float *out, int threads)
{
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t r = 0; r < rows; r++)
        memcpy(out + r * n, source + from[r] * n, n * sizeof(float));
}

/* Adds up each token's rows, in their order: those that row[first[t]] and its followers name. */
void add_rows(
    int64_t tokens, int64_t rows, int64_t n, const int64_t *row, const int64_t *first,
    const float *source, float *out, int threads)
{
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < tokens; t++) {
        int64_t end = t + 1 < tokens ? first[t + 1] : rows;
        float *into = out + t * n;
        memset(into, 0, n * sizeof(float));
        for (int64_t i = first[t]; i < end; i++) {
            const float *from = source + row[i] * n;
#pragma omp simd
            for (int64_t j = 0; j < n; j++)
                into[j] += from[j];
        }
    }
}

/* Each expert's rows [T, inputs] times its matrix, [inputs, outputs], or [outputs, inputs] if
   `outputs_first`. As torch does, the transposes are multiplied. */
void grouped_rows(
    gemm *product, int64_t experts, const int64_t *counts, int inputs, int outputs,
    int outputs_first, const float *rows, int rows_stride, const float *matrices, float *out)
{
    const float one = 1.0f, zero = 0.0f;
    int stride = outputs_first ? inputs : outputs;
    for (int64_t e = 0; e < experts; e++) {
        int count = (int)counts[e];
        if (count)
            product(outputs_first ? "T" : "N", "N", &outputs, &count, &inputs, &one, matrices,
                    &stride, rows, &rows_stride, &zero, out, &outputs);
        rows += (int64_t)count * rows_stride;
        out += (int64_t)count * outputs;
        matrices += (int64_t)inputs * outputs;
    }
}

/* Each expert's left rows, transposed, times its right ones, [left, right], added to `total` or, if
   not `adding`, written there. */
void grouped_weights(
    gemm *product, int64_t experts, const int64_t *counts, int left, int right,
    const float *left_rows, int left_stride, const float *right_rows, int right_stride, float *total,
    int adding)
{
    const float one = 1.0f, beta = adding ? 1.0f : 0.0f;
    for (int64_t e = 0; e < experts; e++) {
        int count = (int)counts[e];
        if (count)
            product("N", "T", &right, &left, &count, &one, right_rows, &right_stride, left_rows,
                    &left_stride, &beta, total, &right);
        else if (!adding)
            memset(total, 0, (int64_t)left * right * sizeof(float));
        left_rows += (int64_t)count * left_stride;
        right_rows += (int64_t)count * right_stride;
        total += (int64_t)left * right;
    }
}

/* Adds rows [T, n] to those of `sums` that `into` names, each sum in the order of the rows. */
static void add_into(
    int64_t rows, int64_t n, const int64_t *into, const float *source, float *sums, int threads)
{
    int64_t width = (n + threads - 1) / threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t first = 0; first < n; first += width) {
        int64_t end = smaller(first + width, n);
        for (int64_t r = 0; r < rows; r++) {
            const float *from = source + r * n;
            float *sum = sums + into[r] * n;
#pragma omp simd
            for (int64_t j = first; j < end; j++)
                sum[j] += from[j];
        }
    }
}

/* What the experts of a rank read and write. Rows lie by expert, `counts` of each; `token` and
   `place` say where each comes from in tokens [N, H] and weights [N, A]. gate_up is [T, 2F], other
   values of all rows [T, F]; `rows`, `grads` [B, H] and `hidden`, `grad_hidden` [B, F] and
   `grad_gate_up` [B, 2F] are room for a block of rows. What is not wanted is 0. */
struct experts {
    gemm *product;
    const int64_t *counts, *token, *place;
    const float *tokens, *probs, *gate_up_weight, *down_weight;
    float *scale, *scale_grad, *gate_up, *activation;
    uint8_t *mask;
    float *inverse, *rows, *hidden, *out, *kept, *weight;
    const float *grad_out, *grad_sums;
    float *grads, *grad_hidden, *grad_gate_up, *grad_tokens, *grad_probs, *of_gate_up, *of_down;
    int64_t width, neurons, k, adding, threads;
};

/* Computes gate and up projections of the experts' rows, and copies the rows' weights. */
void experts_begin(const struct experts *x, int64_t expert, int64_t experts, int64_t row, int64_t rows)
{
    int64_t h = x->width, f = x->neurons;
    for (int64_t r = row; r < row + rows; r++)
        x->scale[r] = x->probs[x->place[r]];
    copy_rows(rows, h, x->token + row, x->tokens, x->rows, (int)x->threads);
    grouped_rows(x->product, experts, x->counts + expert, (int)h, (int)(2 * f), 1, x->rows, (int)h,
                 x->gate_up_weight + expert * 2 * f * h, x->gate_up + row * 2 * f);
}

/* Given the activations of those rows, adds their outputs to those of their tokens. */
void experts_end(const struct experts *x, int64_t expert, int64_t experts, int64_t row, int64_t rows)
{
    int64_t h = x->width, f = x->neurons;
    float *a = x->activation + row * f, *inverse = x->inverse ? x->inverse + row : 0;
    uint8_t *m = x->mask ? x->mask + row * f : 0;
    int threads = (int)x->threads;
    glu_forward(rows, f, x->k, x->gate_up + row * 2 * f + f, 2 * f, a, x->scale + row, m, x->hidden,
                inverse, threads);
    if (x->kept)
        for (int64_t e = expert; e < expert + experts; e++) {
            int64_t count = x->counts[e];
            glu_sums(count, f, a, m, inverse, 0, x->kept + e * f, x->weight + e * f, threads);
            a += count * f;
            m += count * f;
            inverse = inverse ? inverse + count : 0;
        }
    grouped_rows(x->product, experts, x->counts + expert, (int)f, (int)h, 0, x->hidden, (int)f,
                 x->down_weight + expert * f * h, x->rows);
    add_into(rows, h, x->token + row, x->rows, x->out, threads);
}

/* Computes the gradients, of blocks of experts that end before those that `ends` names. */
void experts_backward(const struct experts *x, int64_t blocks, const int64_t *ends)
{
    int64_t h = x->width, f = x->neurons, expert = 0, row = 0;
    int threads = (int)x->threads, adding = (int)x->adding;
    for (int64_t b = 0; b < blocks; b++) {
        int64_t experts = ends[b] - expert, rows = 0;
        const int64_t *counts = x->counts + expert, *token = x->token + row;
        const float *up_weight = x->gate_up_weight + expert * 2 * f * h;
        const float *down_weight = x->down_weight + expert * f * h;
        for (int64_t e = 0; e < experts; e++)
            rows += counts[e];
        copy_rows(rows, h, token, x->grad_out, x->grads, threads);
        grouped_rows(x->product, experts, counts, (int)h, (int)f, 1, x->grads, (int)h, down_weight,
                     x->grad_hidden);
        for (int64_t e = 0, done = 0; e < experts; done += counts[e], e++) {
            int64_t at = row + done;
            const float *gate = x->gate_up + at * 2 * f, *of_sums = x->grad_sums;
            float *grad = x->grad_gate_up + done * 2 * f;
            glu_backward(counts[e], f, gate, 2 * f, gate + f, 2 * f, x->activation + at * f,
                         x->mask ? x->mask + at * f : 0, x->scale + at, x->grad_hidden + done * f, f,
                         of_sums ? of_sums + (expert + e) * f : 0, 0, x->inverse ? x->inverse + at : 0,
                         grad, grad + f, 2 * f, x->scale_grad + at, x->hidden + done * f, threads);
        }
        for (int64_t r = row; r < row + rows; r++)
            x->grad_probs[x->place[r]] = x->scale_grad[r];
        if (x->of_down)
            grouped_weights(x->product, experts, counts, (int)f, (int)h, x->hidden, (int)f, x->grads,
                            (int)h, x->of_down + expert * f * h, adding);
        if (x->of_gate_up) {
            copy_rows(rows, h, token, x->tokens, x->rows, threads);
            grouped_weights(x->product, experts, counts, (int)(2 * f), (int)h, x->grad_gate_up,
                            (int)(2 * f), x->rows, (int)h, x->of_gate_up + expert * 2 * f * h, adding);
        }
        grouped_rows(x->product, experts, counts, (int)(2 * f), (int)h, 0, x->grad_gate_up,
                     (int)(2 * f), up_weight, x->rows);
        add_into(rows, h, token, x->rows, x->grad_tokens, threads);
        expert = ends[b];
        row += rows;
    }
}

/* a * b + c, rounded once where the processor does so as fast. */
#ifdef __FMA__
#define MULTIPLY_ADD(a, b, c) __builtin_fmaf(a, b, c)
#else
#define MULTIPLY_ADD(a, b, c) ((a) * (b) + (c))
#endif

/* Returns e^x for x of at most 0, within 2 units of the last place; 0 below e^-87. NaN stays one.
   Cephes' polynomial, after x = n ln 2 + rest. */
static inline float exponential(float x)
{
    const float round = 12582912.0f; /* 1.5 * 2^23: what is added to it is rounded to whole numbers */
    float bounded = x < -87.0f ? -87.0f : x;
    float shifted = MULTIPLY_ADD(bounded, 1.44269504f, round), n = shifted - round, scale;
    float rest = MULTIPLY_ADD(n, 2.12194440e-4f, MULTIPLY_ADD(n, -0.693359375f, bounded));
    float p = MULTIPLY_ADD(rest, 1.9875691500e-4f, 1.3981999507e-3f);
    p = MULTIPLY_ADD(p, rest, 8.3334519073e-3f);
    p = MULTIPLY_ADD(p, rest, 4.1665795894e-2f);
    p = MULTIPLY_ADD(p, rest, 1.6666665459e-1f);
    p = MULTIPLY_ADD(p, rest, 5.0000001201e-1f);
    p = MULTIPLY_ADD(p, rest * rest, rest) + 1.0f;
    int32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (int32_t)((uint32_t)(bits + 127) << 23);
    memcpy(&scale, &bits, sizeof bits);
    return x < -87.0f ? 0.0f : p * scale;
}

/* Overwrites a row with e^(x - its largest), and returns the largest and the sum. */
static void exponentials(float *row, int64_t n, float *largest, float *sum)
{
    float most = -INFINITY, all = 0.0f;
#pragma omp simd reduction(max : most)
    for (int64_t j = 0; j < n; j++)
        most = row[j] > most ? row[j] : most;
    *largest = most;
    if (isinf(most)) /* an infinity less itself is no number */
        most = 0.0f;
#pragma omp simd reduction(+ : all)
    for (int64_t j = 0; j < n; j++) {
        row[j] = exponential(row[j] - most);
        all += row[j];
    }
    *sum = all;
}

/* Copies a few numbers, without a call. */
static inline void copy(const float *from, int64_t n, float *into)
{
#pragma omp simd
    for (int64_t j = 0; j < n; j++)
        into[j] = from[j];
}

/* Where heads [S, B, N, D] lie, and how far apart positions, sequences and heads are. */
struct heads {
    const float *values;
    int64_t position, sequence, head;
};

/* Copies the rows of a block of queries together, heads of one key one after the other. */
static void gather(
    struct heads from, int64_t b, int64_t head, int64_t per_key, int64_t first, int64_t end,
    int64_t width, float *block)
{
    for (int64_t r = 0; r < per_key; r++)
        for (int64_t s = first; s < end; s++, block += width)
            copy(from.values + s * from.position + b * from.sequence + (head + r) * from.head,
                 width, block);
}

/* The other way round, into contiguous [S, B, N, D]. */
static void scatter(
    const float *block, int64_t b, int64_t head, int64_t per_key, int64_t first, int64_t end,
    int64_t width, int64_t batch, int64_t all_heads, float *into)
{
    for (int64_t r = 0; r < per_key; r++)
        for (int64_t s = first; s < end; s++, block += width)
            copy(block, width, into + ((s * batch + b) * all_heads + head + r) * width);
}

#ifdef _OPENMP
int omp_get_thread_num(void);
#else
static int omp_get_thread_num(void) { return 0; }
#endif

/* Overwrites the scores of n rows, those of queries from `first` on once for each head, with their
   weights: of keys up to the query's own, 0 for the others before `end`. */
static void weights_of_scores(float *scores, int64_t n, int64_t first, int64_t end)
{
    for (int64_t r = 0; r < n; r++) {
        int64_t seen = first + r % (end - first) + 1;
        int64_t whole = smaller((seen + LANES - 1) / LANES * LANES, end);
        float *row = scores + r * end, largest, sum;
        for (int64_t j = seen; j < whole; j++)
            row[j] = -INFINITY;
        exponentials(row, whole, &largest, &sum);
        sum = 1.0f / sum;
#pragma omp simd
        for (int64_t j = 0; j < whole; j++)
            row[j] *= sum;
        memset(row + whole, 0, (end - whole) * sizeof(float));
    }
}

/* Overwrites the gradients of those weights with the gradients of the scores. */
static void grads_of_scores(
    const float *weights, float *grads, int64_t n, int64_t first, int64_t end)
{
    for (int64_t r = 0; r < n; r++) {
        const float *weight = weights + r * end;
        float *row = grads + r * end, dot = 0.0f;
        int64_t seen = first + r % (end - first) + 1; /* the weights of all others are 0 */
        int64_t whole = smaller((seen + LANES - 1) / LANES * LANES, end);
#pragma omp simd reduction(+ : dot)
        for (int64_t j = 0; j < whole; j++)
            dot += row[j] * weight[j];
#pragma omp simd
        for (int64_t j = 0; j < whole; j++)
            row[j] = weight[j] * (row[j] - dot);
        memset(row + whole, 0, (end - whole) * sizeof(float));
    }
}

/* Returns how many weights of so many heads are kept: of each query, those of its block's keys. */
static int64_t weights_kept(int64_t heads, int64_t length, int64_t step)
{
    int64_t all = 0;
    for (int64_t first = 0; first < length; first += step) {
        int64_t end = smaller(first + step, length);
        all += heads * (end - first) * end;
    }
    return all;
}

/* The gradients of n queries [n, d], from `first` on once for each head, and of the keys and values
   before `end`, from those of the queries' contexts [n, d]. Those of keys and values are added to
   what there is if `adding`, else written. `grads` is room for those of the weights. */
static void grads_of_block(
    gemm *product, float scale, int adding, int d, int64_t n, int64_t first, int64_t end,
    const float *queries, const float *of_contexts, const float *keys, int key_stride,
    const float *values, int value_stride, const float *weights, float *grads, float *of_queries,
    float *of_keys, int of_key_stride, float *of_values, int of_value_stride)
{
    const float one = 1.0f, zero = 0.0f, *beta = adding ? &one : &zero;
    int rows = (int)n, seen = (int)end;
    product("N", "T", &d, &seen, &rows, &one, of_contexts, &d, weights, &seen, beta, of_values,
            &of_value_stride);
    product("T", "N", &seen, &rows, &d, &one, values, &value_stride, of_contexts, &d, &zero, grads,
            &seen);
    grads_of_scores(weights, grads, n, first, end);
    product("N", "T", &d, &seen, &rows, &scale, queries, &d, grads, &seen, beta, of_keys,
            &of_key_stride);
    product("N", "N", &d, &rows, &seen, &scale, keys, &key_stride, grads, &seen, &zero, of_queries,
            &d);
}

/* Causal attention of [S, B, N, D], to keys and values [S, B, G, D]. Weights of a block of `step`
   queries, up to its last key, are kept one block after the other, [B * G, N / G * queries, keys]
   each; where `keeping` is 0 there is room for one block and head of each thread. */
void attention_forward(
    gemm *product, int64_t length, int64_t batch, int64_t groups, int64_t per_key, int64_t width,
    int64_t step, float scale, const float *query, int64_t q_s, int64_t q_b, int64_t q_n,
    const float *key, int64_t k_s, int64_t k_b, int64_t k_n, const float *value, int64_t v_s,
    int64_t v_b, int64_t v_n, float *weights, int keeping, float *room, float *context, int threads)
{
    int64_t heads = groups * per_key;
    struct heads queries = {query, q_s, q_b, q_n};
    const float one = 1.0f, zero = 0.0f;
    int d = (int)width, key_stride = (int)k_s, value_stride = (int)v_s;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t m = 0; m < batch * groups; m++) {
        int64_t b = m / groups, g = m % groups;
        const float *k = key + b * k_b + g * k_n, *v = value + b * v_b + g * v_n;
        float *block = room + omp_get_thread_num() * per_key * step * width, *kept = weights;
        for (int64_t first = 0; first < length; first += step) {
            int64_t end = smaller(first + step, length), n = per_key * (end - first);
            float *w = keeping ? kept + m * n * end
                               : weights + omp_get_thread_num() * per_key * step * length;
            int rows = (int)n, keys = (int)end;
            gather(queries, b, g * per_key, per_key, first, end, width, block);
            product("T", "N", &keys, &rows, &d, &scale, k, &key_stride, block, &d, &zero, w, &keys);
            weights_of_scores(w, n, first, end);
            product("N", "N", &d, &rows, &keys, &one, v, &value_stride, w, &keys, &zero, block, &d);
            scatter(block, b, g * per_key, per_key, first, end, width, batch, heads, context);
            kept += batch * groups * n * end;
        }
    }
}

/* Gradients of queries [S, B, N, D], keys and values [S, B, G, D] from that of the context. `room`
   holds (3 * width + length) numbers for each query of a block and head of a key, for each thread. */
void attention_backward(
    gemm *product, int64_t length, int64_t batch, int64_t groups, int64_t per_key, int64_t width,
    int64_t step, float scale, const float *query, int64_t q_s, int64_t q_b, int64_t q_n,
    const float *key, int64_t k_s, int64_t k_b, int64_t k_n, const float *value, int64_t v_s,
    int64_t v_b, int64_t v_n, const float *weights, const float *grad, float *room,
    float *grad_query, float *grad_key, float *grad_value, int threads)
{
    int64_t heads = groups * per_key, most = per_key * step;
    struct heads queries = {query, q_s, q_b, q_n};
    struct heads grads = {grad, batch * heads * width, heads * width, width};
    int d = (int)width, key_stride = (int)k_s, value_stride = (int)v_s;
    int out_stride = (int)(batch * groups * width);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t m = 0; m < batch * groups; m++) {
        int64_t b = m / groups, g = m % groups;
        const float *k = key + b * k_b + g * k_n, *v = value + b * v_b + g * v_n;
        float *into_key = grad_key + m * width, *into_value = grad_value + m * width;
        float *block = room + omp_get_thread_num() * most * (3 * width + length);
        float *of_context = block + most * width, *of_query = of_context + most * width;
        float *of_weights = of_query + most * width;
        int64_t after = weights_kept(batch * heads, length, step);
        /* The last block sees all keys and comes first: it writes what the others add to. */
        for (int64_t first = (length - 1) / step * step; first >= 0; first -= step) {
            int64_t end = smaller(first + step, length), n = per_key * (end - first);
            after -= batch * groups * n * end;
            const float *w = weights + after + m * n * end;
            gather(queries, b, g * per_key, per_key, first, end, width, block);
            gather(grads, b, g * per_key, per_key, first, end, width, of_context);
            grads_of_block(product, scale, end < length, d, n, first, end, block, of_context, k,
                           key_stride, v, value_stride, w, of_weights, of_query, into_key,
                           out_stride, into_value, out_stride);
            scatter(of_query, b, g * per_key, per_key, first, end, width, batch, heads, grad_query);
        }
    }
}

/* One head of one token: normalised (RMSNorm) and turned by its position (RoPE). */
static inline void turn_row(
    const float *x, const float *weight, float scale, const float *cos, const float *sin,
    int64_t width, float *out)
{
    int64_t half = width / 2;
#pragma omp simd
    for (int64_t j = 0; j < half; j++) {
        float first = x[j] * scale * weight[j];
        float second = x[half + j] * scale * weight[half + j];
        out[j] = first * cos[j] - second * sin[j];
        out[half + j] = second * cos[half + j] + first * sin[half + j];
    }
}

/* What a row is divided by, and that for the gradient, which is no number where squares overflow. */
static inline float scale_of_row(const float *x, int64_t width, float eps, float *inverse)
{
    float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
    for (int64_t j = 0; j < width; j++)
        squares += x[j] * x[j];
    float scale = 1.0f / sqrtf(squares / (float)width + eps);
    *inverse = scale * (scale / scale);
    return scale;
}

/* The gradient of x from that of what turn_row made, which is overwritten; `part` adds up the
   weight's. */
static inline void turn_row_back(
    float *grad, const float *x, const float *weight, float scale, const float *cos,
    const float *sin, int64_t width, float *into, float *part)
{
    int64_t half = width / 2;
    float dot = 0.0f;
#pragma omp simd
    for (int64_t j = 0; j < half; j++) {
        float first = grad[j], second = grad[half + j];
        grad[j] = first * cos[j] + second * sin[half + j];
        grad[half + j] = second * cos[half + j] - first * sin[j];
    }
#pragma omp simd reduction(+ : dot)
    for (int64_t j = 0; j < width; j++) {
        float product = grad[j] * (x[j] * scale);
        part[j] += product;
        dot += product * weight[j];
    }
    float mean = dot / (float)width * scale;
#pragma omp simd
    for (int64_t j = 0; j < width; j++)
        into[j] = (grad[j] * weight[j] - x[j] * mean) * scale;
}

/* What heads are made of: projections [S, B, G, R + 2, D], of each key's queries, of the key and of
   the value; weights [D] of the norms; cosines and sines [S, D]. inverse is [B * G, R + 1, S]. */
struct heads_made {
    gemm *product;
    const float *mixed, *query_weight, *key_weight, *cos, *sin;
    float *inverse, *weights, *room;
    float *context;                       /* [S, B, G, R, D] */
    const float *grad;                    /* of it */
    float *grad_mixed, *parts;            /* parts [B * G, 2, D]: of the weights, queries' first */
    int64_t length, batch, groups, per_key, width, step, keeping, threads;
    float scale, query_eps, key_eps;
};

/* Causal attention as attention_forward, of heads that are normalised and turned here. `room` holds
   (step * R + S) * D numbers for each thread. */
void attend_forward(const struct heads_made *x)
{
    int64_t length = x->length, batch = x->batch, groups = x->groups, per_key = x->per_key;
    int64_t width = x->width, step = x->step, heads = groups * per_key;
    int64_t position = batch * groups * (per_key + 2) * width;
    const float one = 1.0f, zero = 0.0f;
    int d = (int)width, value_stride = (int)position, threads = (int)x->threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t m = 0; m < batch * groups; m++) {
        int64_t b = m / groups, g = m % groups;
        const float *from = x->mixed + m * (per_key + 2) * width;
        const float *key = from + per_key * width, *v = key + width;
        float *inverse = x->inverse + m * (per_key + 1) * length, *kept = x->weights;
        float *block = x->room + omp_get_thread_num() * (per_key * step + length) * width;
        float *keys_turned = block + per_key * step * width;
        for (int64_t s = 0; s < length; s++) {
            const float *row = key + s * position;
            float scale = scale_of_row(row, width, x->key_eps, inverse + per_key * length + s);
            turn_row(row, x->key_weight, scale, x->cos + s * width, x->sin + s * width, width,
                     keys_turned + s * width);
        }
        for (int64_t first = 0; first < length; first += step) {
            int64_t end = smaller(first + step, length), n = per_key * (end - first);
            float *w = x->keeping ? kept + m * n * end
                                  : x->weights + omp_get_thread_num() * per_key * step * length;
            int rows = (int)n, keys = (int)end;
            float *into = block;
            for (int64_t r = 0; r < per_key; r++)
                for (int64_t s = first; s < end; s++, into += width) {
                    const float *row = from + s * position + r * width;
                    float scale = scale_of_row(row, width, x->query_eps, inverse + r * length + s);
                    turn_row(row, x->query_weight, scale, x->cos + s * width, x->sin + s * width,
                             width, into);
                }
            x->product("T", "N", &keys, &rows, &d, &x->scale, keys_turned, &d, block, &d, &zero, w,
                       &keys);
            weights_of_scores(w, n, first, end);
            x->product("N", "N", &d, &rows, &keys, &one, v, &value_stride, w, &keys, &zero, block,
                       &d);
            scatter(block, b, g * per_key, per_key, first, end, width, batch, heads, x->context);
            kept += batch * groups * n * end;
        }
    }
}

/* Its gradients. `room` holds (step * R * (3 * D + S) + 2 * S * D) numbers for each thread. */
void attend_backward(const struct heads_made *x)
{
    int64_t length = x->length, batch = x->batch, groups = x->groups, per_key = x->per_key;
    int64_t width = x->width, step = x->step, heads = groups * per_key, most = per_key * step;
    int64_t position = batch * groups * (per_key + 2) * width;
    struct heads grads = {x->grad, batch * heads * width, heads * width, width};
    int d = (int)width, value_stride = (int)position, threads = (int)x->threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t m = 0; m < batch * groups; m++) {
        int64_t b = m / groups, g = m % groups;
        const float *from = x->mixed + m * (per_key + 2) * width;
        const float *key = from + per_key * width, *v = key + width;
        const float *inverse = x->inverse + m * (per_key + 1) * length;
        float *into = x->grad_mixed + m * (per_key + 2) * width;
        float *into_key = into + per_key * width, *into_value = into_key + width;
        float *of_query_weight = x->parts + m * 2 * width, *of_key_weight = of_query_weight + width;
        float *block = x->room
                       + omp_get_thread_num() * (most * (3 * width + length) + 2 * length * width);
        float *of_context = block + most * width, *of_query = of_context + most * width;
        float *of_weights = of_query + most * width, *keys_turned = of_weights + most * length;
        float *of_keys = keys_turned + length * width;
        memset(of_query_weight, 0, 2 * width * sizeof(float));
        for (int64_t s = 0; s < length; s++)
            turn_row(key + s * position, x->key_weight, inverse[per_key * length + s],
                     x->cos + s * width, x->sin + s * width, width, keys_turned + s * width);
        int64_t after = weights_kept(batch * heads, length, step);
        /* The last block sees all keys and comes first: it writes what the others add to. */
        for (int64_t first = (length - 1) / step * step; first >= 0; first -= step) {
            int64_t end = smaller(first + step, length), n = per_key * (end - first);
            after -= batch * groups * n * end;
            const float *w = x->weights + after + m * n * end;
            float *turned = block;
            for (int64_t r = 0; r < per_key; r++)
                for (int64_t s = first; s < end; s++, turned += width)
                    turn_row(from + s * position + r * width, x->query_weight,
                             inverse[r * length + s], x->cos + s * width, x->sin + s * width, width,
                             turned);
            gather(grads, b, g * per_key, per_key, first, end, width, of_context);
            grads_of_block(x->product, x->scale, end < length, d, n, first, end, block, of_context,
                           keys_turned, d, v, value_stride, w, of_weights, of_query, of_keys, d,
                           into_value, value_stride);
            turned = of_query;
            for (int64_t r = 0; r < per_key; r++)
                for (int64_t s = first; s < end; s++, turned += width) {
                    int64_t at = s * position + r * width;
                    turn_row_back(turned, from + at, x->query_weight, inverse[r * length + s],
                                  x->cos + s * width, x->sin + s * width, width, into + at,
                                  of_query_weight);
                }
        }
        for (int64_t s = 0; s < length; s++)
            turn_row_back(of_keys + s * width, key + s * position, x->key_weight,
                          inverse[per_key * length + s], x->cos + s * width, x->sin + s * width,
                          width, into_key + s * position, of_key_weight);
    }
}

/* Of rows of logits [T, stride], n of each: the largest (0 for an infinite one), and the logarithm of
   the sum of e^logit. The logits are overwritten with e^(logit - largest), unless there is `room`,
   for a row of each thread. */
void cross_entropy_forward(
    int64_t rows, int64_t n, int64_t stride, float *logits, float *room, float *largest,
    float *log_sum, int threads)
{
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < rows; t++) {
        float *row = logits + t * stride, sum;
        if (room)
            row = memcpy(room + omp_get_thread_num() * n, row, n * sizeof(float));
        exponentials(row, n, largest + t, &sum);
        if (isinf(largest[t]))
            largest[t] = 0.0f;
        log_sum[t] = logf(sum) + largest[t];
    }
}

/* Whether a is ranked before b: a NaN is the largest, as it is to torch. */
static inline int before(float a, float b)
{
    return a != a ? b == b : a > b;
}

/* Writes the places of the k largest of n numbers, the largest first; ties in their order. */
static void places_of_row(int64_t n, int64_t k, const float *row, int64_t *places)
{
    int64_t count = 0;
    for (int64_t j = 0; j < n; j++) {
        if (count == k && !before(row[j], row[places[k - 1]]))
            continue;
        int64_t at = count < k ? count++ : k - 1;
        for (; at > 0 && before(row[j], row[places[at - 1]]); at--)
            places[at] = places[at - 1];
        places[at] = j;
    }
}

/* Of rows [R, n], the places of the k largest [R, k]. */
void largest_places(
    int64_t rows, int64_t n, int64_t k, const float *values, int64_t *places, int threads)
{
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t r = 0; r < rows; r++)
        places_of_row(n, k, values + r * n, places + r * k);
}

/* What a router reads and writes: tokens [N], experts [A]. */
struct routed {
    const float *logits;   /* [N, A] */
    float *scores;         /* [N, A], the softmax of all logits */
    float *log_sum;        /* [N], the logarithm of the sum of e^logit */
    float *probs;          /* [N, A], the weight of each chosen expert, else 0 */
    uint8_t *chosen;       /* [N, A] */
    float *counts;         /* [A], the tokens of each expert */
    float *z_loss;         /* the mean square of log_sum, times z_factor */
    float *balance_loss;   /* the sum over experts of tokens times scores, times balance_factor */
    const float *grad_probs, *grad_z_loss, *grad_balance_loss; /* each 0 where there is none */
    float *grad_logits;    /* [N, A] */
    int64_t tokens, experts, k, of_all, threads; /* of_all: weights are scores of all experts */
    float scaling, z_factor, balance_factor;     /* scaling: of the weights */
};

/* Chooses the k experts with the largest logits. Their weights are a softmax of all logits or of the
   chosen ones. */
void route_forward(const struct routed *x)
{
    int64_t n = x->experts, k = x->k;
#pragma omp parallel for schedule(static) num_threads((int)x->threads) if (x->threads > 1)
    for (int64_t t = 0; t < x->tokens; t++) {
        float *scores = memcpy(x->scores + t * n, x->logits + t * n, n * sizeof(float));
        float *probs = memset(x->probs + t * n, 0, n * sizeof(float));
        uint8_t *chosen = memset(x->chosen + t * n, 0, n);
        float largest, sum, of_chosen = 0.0f;
        int64_t places[MOST_LARGEST];
        places_of_row(n, k, scores, places);
        exponentials(scores, n, &largest, &sum);
        for (int64_t i = 0; i < k; i++)
            of_chosen += scores[places[i]];
        for (int64_t i = 0; i < k; i++) {
            chosen[places[i]] = 1;
            probs[places[i]] = scores[places[i]] / (x->of_all ? sum : of_chosen) * x->scaling;
        }
#pragma omp simd
        for (int64_t j = 0; j < n; j++)
            scores[j] /= sum;
        x->log_sum[t] = logf(sum) + (isinf(largest) ? 0.0f : largest);
    }
    for (int64_t t = 0; t < x->tokens; t++)
#pragma omp simd
        for (int64_t j = 0; j < n; j++)
            x->counts[j] += (float)x->chosen[t * n + j];
}

/* Both losses, by counts of all ranks that share the microbatch. */
void route_losses(const struct routed *x)
{
    int64_t n = x->experts;
    double squares = 0.0, balance = 0.0;
    for (int64_t t = 0; t < x->tokens; t++) {
        squares += (double)x->log_sum[t] * x->log_sum[t];
        for (int64_t j = 0; j < n; j++)
            balance += (double)x->scores[t * n + j] * x->counts[j];
    }
    *x->z_loss = (float)(squares / x->tokens * x->z_factor);
    *x->balance_loss = (float)(balance * x->balance_factor);
}

/* The gradient of the logits by those of the weights and of both losses. */
void route_backward(const struct routed *x)
{
    int64_t n = x->experts;
    float of_z = 0.0f, of_balance = 0.0f;
    if (x->grad_z_loss)
        of_z = *x->grad_z_loss * x->z_factor * 2.0f / (float)x->tokens;
    if (x->grad_balance_loss)
        of_balance = *x->grad_balance_loss * x->balance_factor;
#pragma omp parallel for schedule(static) num_threads((int)x->threads) if (x->threads > 1)
    for (int64_t t = 0; t < x->tokens; t++) {
        const float *scores = x->scores + t * n, *probs = x->probs + t * n;
        float *grad = x->grad_logits + t * n, mean = 0.0f, sum = 0.0f;
        float from_scores = of_z * x->log_sum[t];
#pragma omp simd reduction(+ : mean)
        for (int64_t j = 0; j < n; j++)
            mean += scores[j] * x->counts[j];
#pragma omp simd
        for (int64_t j = 0; j < n; j++)
            grad[j] = scores[j] * (of_balance * (x->counts[j] - mean) + from_scores);
        if (!x->grad_probs)
            continue;
        const float *of_probs = x->grad_probs + t * n;
        for (int64_t j = 0; j < n; j++)
            sum += x->chosen[t * n + j] ? of_probs[j] * probs[j] : 0.0f;
        const float *shares = x->of_all ? scores : probs;
        float factor = x->of_all ? 1.0f : 1.0f / x->scaling;
        for (int64_t j = 0; j < n; j++) {
            if (x->chosen[t * n + j])
                grad[j] += probs[j] * of_probs[j];
            grad[j] -= shares[j] * factor * sum;
        }
    }
}
