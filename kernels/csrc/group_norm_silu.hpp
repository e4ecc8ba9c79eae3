// silu(group_norm(x + residual)) over float32: one read for the statistics, one for the result. The Python reference
// in ops/group_norm_silu.py is the specification.
//
// Statistics are taken of blocks that fit the first-level cache, in two passes there, and merged in float64 as Chan,
// Golub and LeVeque do ("Updating formulae", 1979), in an order that only the sizes of one sample decide. The mean is
// kept as two floats, so that x - mean stays exact where the mean is thousands of times the spread.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

#include "parallel.hpp"
#include "rows.hpp"

namespace tintype {

struct NormShape {
    std::size_t n, channels, pixels, groups;
    std::size_t per_group() const { return channels / groups; }
    std::size_t sample() const { return channels * pixels; }
    std::size_t bytes() const { return n * sample() * sizeof(float); }
};

struct NormInputs {
    const float *x, *weight, *bias, *residual;
    Residual kind;
    float eps;
    bool silu;
};

// Count, mean and squared deviations of some numbers.
struct Moments {
    double count, mean, squares;

    void merge(double other_count, double other_mean, double other_squares) {
        const double total = count + other_count, delta = other_mean - mean;
        squares += other_squares + delta * delta * count * other_count / total;
        mean += delta * other_count / total;
        count = total;
    }
};

// One group's statistics as the backward pass wants them, [3, groups] of a sample: mean, its low part, 1 / deviation.
struct GroupStats {
    float mean, low, rstd;

    GroupStats(const Moments& m, float eps)
        : mean(static_cast<float>(m.mean)),
          low(static_cast<float>(m.mean - mean)),
          rstd(static_cast<float>(1.0 / std::sqrt(m.squares / m.count + eps))) {}

    void write(float* stats, std::size_t groups) const { stats[0] = mean, stats[groups] = low, stats[2 * groups] = rstd; }

    Affine affine(float weight, float bias) const { return {mean, rstd * weight, bias - low * rstd * weight}; }
};

// ---- contiguous: a channel is a row ----

constexpr std::size_t kRowBlock = 4096;  // floats of a row that are summed twice while the first-level cache has them

inline void add_row(const float* x, const float* residual, float shift, std::size_t n, Moments& to) {
    float two[2];
    for (std::size_t from = 0; from < n; from += kRowBlock) {
        const std::size_t count = std::min(kRowBlock, n - from);
        const float* extra = residual ? residual + from : nullptr;
        rows().norm->row_sums(x + from, extra, shift, count, 0.0f, two);
        const float centre = two[0] / static_cast<float>(count);
        rows().norm->row_sums(x + from, extra, shift, count, centre, two);
        const double sum = two[0], away = sum / static_cast<double>(count);
        to.merge(static_cast<double>(count), centre + away, two[1] - away * sum);
    }
}

inline void norm_group(const NormInputs& in, const NormShape& s, std::size_t sample, std::size_t group, float* out,
                       float* stats) {
    const std::size_t first = sample * s.channels + group * s.per_group(), last = first + s.per_group();
    const auto residual = [&](std::size_t row) { return in.kind == Residual::full ? in.residual + row * s.pixels : nullptr; };
    const auto shift = [&](std::size_t row) { return in.kind == Residual::channel ? in.residual[row] : 0.0f; };
    Moments moments{0, 0, 0};
    if (in.kind == Residual::channel)
        for (std::size_t row = first; row < last; ++row) add_row(in.x + row * s.pixels, nullptr, shift(row), s.pixels, moments);
    else  // a group's rows lie end to end
        add_row(in.x + first * s.pixels, residual(first), 0.0f, s.per_group() * s.pixels, moments);
    const GroupStats found(moments, in.eps);
    found.write(stats + sample * 3 * s.groups + group, s.groups);
    for (std::size_t row = first; row < last; ++row) {
        const std::size_t c = row - sample * s.channels, at = row * s.pixels;
        const Affine f = found.affine(in.weight[c], in.bias[c]);
        rows().norm->row_apply(in.x + at, residual(row), shift(row), s.pixels, f, in.silu, out + at);
    }
}

inline void group_norm_silu_contiguous(const NormInputs& in, const NormShape& s, float* out, float* stats) {
    parallel_for(s.n * s.groups, s.bytes(), [&](std::size_t i) { norm_group(in, s, i / s.groups, i % s.groups, out, stats); });
}

// ---- channels last: a pixel is a row, and every channel has sums of its own ----

// A sample's work: tiles that are summed twice while the second-level cache has them, four to a thread's piece.
struct Pieces {
    std::size_t tile, span, count;
    explicit Pieces(const NormShape& s)
        : tile(std::max<std::size_t>(1, 32768 / s.channels)), span(4 * tile), count((s.pixels + span - 1) / span) {}
};

struct ChannelsLast {
    const NormInputs& in;
    const NormShape& s;
    const Pieces pieces;
    std::vector<double> mean, squares;  // [n, pieces, channels]
    std::vector<float> affine;          // [n, 3, channels]: centre, scale, offset

    ChannelsLast(const NormInputs& inputs, const NormShape& shape)
        : in(inputs), s(shape), pieces(shape), mean(s.n * pieces.count * s.channels), squares(mean.size()),
          affine(s.n * 3 * s.channels) {}

    std::size_t offset(std::size_t i) const { return i / pieces.count * s.sample() + i % pieces.count * pieces.span * s.channels; }
    std::size_t pixels(std::size_t i) const { return std::min(pieces.span, s.pixels - i % pieces.count * pieces.span); }
    const float* residual(std::size_t i, std::size_t at) const {
        if (in.kind == Residual::full) return in.residual + at;
        return in.kind == Residual::channel ? in.residual + i / pieces.count * s.channels : nullptr;
    }

    void add_piece(std::size_t i) {
        for (std::size_t from = 0; from < pixels(i); from += pieces.tile) {
            const std::size_t at = offset(i) + from * s.channels, count = std::min(pieces.tile, pixels(i) - from);
            rows().norm->column_moments(in.x + at, residual(i, at), in.kind, count, s.channels, static_cast<double>(from),
                                  &mean[i * s.channels], &squares[i * s.channels]);
        }
    }

    // The mean of the pieces' means first, then squares around it: merging one by one would divide for every channel.
    void merge_group(std::size_t sample, std::size_t group, float* stats) {
        const std::size_t first = group * s.per_group(), last = first + s.per_group();
        Moments moments{static_cast<double>(s.per_group() * s.pixels), 0, 0};
        const auto each = [&](auto add) {
            for (std::size_t i = sample * pieces.count; i < (sample + 1) * pieces.count; ++i)
                for (std::size_t at = i * s.channels + first; at < i * s.channels + last; ++at)
                    add(static_cast<double>(pixels(i)), mean[at], squares[at]);
        };
        each([&](double count, double its_mean, double) { moments.mean += count * its_mean; });
        moments.mean /= moments.count;
        each([&](double count, double its_mean, double its_squares) {
            moments.squares += its_squares + count * (its_mean - moments.mean) * (its_mean - moments.mean);
        });
        const GroupStats found(moments, in.eps);
        found.write(stats + sample * 3 * s.groups + group, s.groups);
        float* to = &affine[sample * 3 * s.channels];
        for (std::size_t c = first; c < last; ++c) {
            const Affine f = found.affine(in.weight[c], in.bias[c]);
            to[c] = f.centre, to[s.channels + c] = f.scale, to[2 * s.channels + c] = f.offset;
        }
    }

    void apply_piece(std::size_t i, float* out) const {
        const std::size_t at = offset(i);
        rows().norm->column_apply(in.x + at, residual(i, at), in.kind, pixels(i), s.channels,
                            &affine[i / pieces.count * 3 * s.channels], in.silu, out + at);
    }
};

inline void group_norm_silu_channels_last(const NormInputs& in, const NormShape& s, float* out, float* stats) {
    ChannelsLast work(in, s);
    const std::size_t all = s.n * work.pieces.count;
    parallel_for(all, s.bytes(), [&](std::size_t i) { work.add_piece(i); });
    for (std::size_t i = 0; i < s.n * s.groups; ++i) work.merge_group(i / s.groups, i % s.groups, stats);
    parallel_for(all, s.bytes(), [&](std::size_t i) { work.apply_piece(i, out); });
}

}  // namespace tintype
