// silu(group_norm(x + residual)) over float32: one read for the statistics, one for the result. The Python reference
// in ops/group_norm_silu.py is the specification.
//
// Statistics are taken in one pass, of blocks, around a centre near their mean, and merged in float64 as Chan, Golub and
// LeVeque do ("Updating formulae", 1979), in an order that only the sizes of one sample decide. The mean is kept as two
// floats, so that x - mean stays exact where the mean is thousands of times the spread.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
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

    // What is added to the element at `at`, where that has x's shape, and to channel c of all samples' where not.
    const float* full(std::size_t at) const { return kind == Residual::full ? residual + at : nullptr; }
    float shift(std::size_t c) const { return kind == Residual::channel ? residual[c] : 0.0f; }
};

// Count, mean and squared deviations of some numbers.
struct Moments {
    double count, mean, squares;

    void merge(const Moments& other) {
        const double share = other.count / (count + other.count), delta = other.mean - mean;
        squares += other.squares + delta * delta * count * share;
        mean += delta * share;
        count += other.count;
    }
};

// One group's statistics as the backward pass wants them, [3, groups] of a sample: mean, its low part, 1 / deviation.
struct GroupStats {
    float mean, low, rstd;

    GroupStats(const Moments& m, float eps)
        : mean(static_cast<float>(m.mean)),
          low(static_cast<float>(m.mean - mean)),
          rstd(inverse(std::sqrt(m.squares / m.count + eps))) {}

    // NaN where it is too small for a float: by zero, or by what threads that flush it take for zero, nobody would see it.
    static float inverse(double deviation) {
        const bool held = 1.0 / deviation >= std::numeric_limits<float>::min();
        return held ? static_cast<float>(1.0 / deviation) : std::numeric_limits<float>::quiet_NaN();
    }

    void write(float* stats, std::size_t groups) const { stats[0] = mean, stats[groups] = low, stats[2 * groups] = rstd; }

    // A shift moves the centre: in the offset it would cancel, where it is thousands of times the spread.
    Affine affine(float weight, float bias, float shift) const {
        const double middle = static_cast<double>(mean) + low - shift;
        const float centre = static_cast<float>(middle), rest = static_cast<float>(middle - centre), scale = rstd * weight;
        return {centre, scale, bias - rest * scale};
    }
};

// A residual that a channel's pixels share only moves their mean: no inner loop sees it.
inline Moments block_moments(double count, float centre, float shift, double sum, double squares) {
    const double away = sum / count;
    return {count, static_cast<double>(centre) + shift + away, squares - away * sum};
}

inline float mean_of(const float* x, const float* residual, std::size_t n) {
    float two[2];
    rows().norm->row_sums(x, residual, n, 0.0f, two);
    return two[0] / static_cast<float>(n);
}

// A group's moments in float64, value by value, from its first; those between two channels and two pixels are given. For
// values whose squares pass what a float holds.
inline Moments wide_moments(const NormInputs& in, const NormShape& s, std::size_t sample, std::size_t group,
                            std::size_t between_channels, std::size_t between_pixels) {
    const std::size_t first = group * s.per_group(), last = first + s.per_group();
    const double count = static_cast<double>(s.per_group() * s.pixels);
    const auto sum = [&](double centre, double power) {
        double total = 0;
        for (std::size_t c = first; c < last; ++c)
            for (std::size_t p = 0; p < s.pixels; ++p) {
                const std::size_t at = sample * s.sample() + c * between_channels + p * between_pixels;
                const float* full = in.full(at);
                const float added = full ? *full : in.shift(sample * s.channels + c);
                const double away = static_cast<double>(in.x[at]) + added - centre;
                total += power == 1 ? away : away * away;
            }
        return total;
    };
    const double mean = sum(0, 1) / count;
    return {count, mean, sum(mean, 2)};
}

// ---- contiguous: a channel is a row ----

constexpr std::size_t kRowBlock = 4096, kFirstBlock = 256;  // floats

// The first block's centre is its mean, the others' that of all before them. A block of no more than `growth` times what
// came before has squares around its centre of at most growth + 2 times those that the group ends with: little is lost.
inline void add_row(const float* x, const float* residual, float shift, std::size_t n, Moments& to) {
    constexpr std::size_t growth = 8;
    float two[2];
    for (std::size_t from = 0, count; from < n; from += count) {
        const auto before = static_cast<std::size_t>(to.count);
        count = std::min({n - from, kRowBlock, std::max(kFirstBlock, growth * before)});
        const float* extra = residual ? residual + from : nullptr;
        const float centre = before ? static_cast<float>(to.mean - shift) : mean_of(x + from, extra, count);
        rows().norm->row_sums(x + from, extra, count, centre, two);
        to.merge(block_moments(static_cast<double>(count), centre, shift, two[0], two[1]));
    }
}

inline void norm_group(const NormInputs& in, const NormShape& s, std::size_t sample, std::size_t group, float* out,
                       float* stats) {
    const std::size_t first = sample * s.channels + group * s.per_group(), last = first + s.per_group();
    Moments moments{0, 0, 0};
    if (in.kind == Residual::channel)
        for (std::size_t row = first; row < last; ++row)
            add_row(in.x + row * s.pixels, nullptr, in.shift(row), s.pixels, moments);
    else  // a group's rows lie end to end
        add_row(in.x + first * s.pixels, in.full(first * s.pixels), 0.0f, s.per_group() * s.pixels, moments);
    if (!std::isfinite(moments.squares)) moments = wide_moments(in, s, sample, group, s.pixels, 1);
    const GroupStats found(moments, in.eps);
    found.write(stats + sample * 3 * s.groups + group, s.groups);
    for (std::size_t row = first; row < last; ++row) {
        const std::size_t c = row - sample * s.channels, at = row * s.pixels;
        const Affine f = found.affine(in.weight[c], in.bias[c], in.shift(row));
        rows().norm->row_apply(in.x + at, in.full(at), s.pixels, f, in.silu, out + at);
    }
}

inline void group_norm_silu_contiguous(const NormInputs& in, const NormShape& s, float* out, float* stats) {
    parallel_for(s.n * s.groups, s.bytes(), [&](std::size_t i) { norm_group(in, s, i / s.groups, i % s.groups, out, stats); });
}

// ---- channels last: a pixel is a row, and every channel has sums of its own ----

// How many pieces of nearly the same size a sample's pixels make: a block of statistics each, short enough for sums in
// float32.
inline std::size_t piece_count(const NormShape& s) {
    const std::size_t most = std::clamp<std::size_t>(131072 / s.channels, 1, 256);
    return (s.pixels + most - 1) / most;
}

struct ChannelsLast {
    const NormInputs& in;
    const NormShape& s;
    const std::size_t pieces;
    std::vector<Moments> moments;  // [n, pieces, groups]
    std::vector<float> affine;     // [n, 3, channels]: centre, scale, offset

    ChannelsLast(const NormInputs& inputs, const NormShape& shape)
        : in(inputs), s(shape), pieces(piece_count(shape)), moments(s.n * pieces * s.groups), affine(s.n * 3 * s.channels) {}

    std::size_t sample(std::size_t i) const { return i / pieces; }
    std::size_t from(std::size_t i) const { return i % pieces * s.pixels / pieces; }
    std::size_t pixels(std::size_t i) const { return (i % pieces + 1) * s.pixels / pieces - from(i); }
    std::size_t offset(std::size_t i) const { return sample(i) * s.sample() + from(i) * s.channels; }

    void add_piece(std::size_t i) {
        const float *x = in.x + offset(i), *residual = in.full(offset(i));
        const std::size_t width = s.per_group(), some = std::min<std::size_t>(pixels(i), 8);
        std::vector<float> centre(s.channels), two(2 * s.channels);
        // A group's centre is the mean of some pixels from all over the piece.
        rows().norm->column_sums(x, residual, some, pixels(i) / some * s.channels, s.channels, centre.data(), two.data());
        for (std::size_t first = 0; first < s.channels; first += width)
            std::fill_n(&centre[first], width, mean_of(&two[first], nullptr, width) / static_cast<float>(some));
        const auto sum = [&] {
            rows().norm->column_sums(x, residual, pixels(i), s.channels, s.channels, centre.data(), two.data());
        };
        sum();
        if (recentre(i, centre, two.data())) sum();
        for (std::size_t group = 0; group < s.groups; ++group)
            moments[i * s.groups + group] = group_moments(i, group * width, centre[group * width], two.data());
    }

    // Moves the centres that lie farther from their group's mean than its values do, as where the pixels that they are of
    // were unlike the others, to that mean: squares around them would cancel. Whether there were any.
    bool recentre(std::size_t i, std::vector<float>& centre, const float* two) const {
        const double count = static_cast<double>(pixels(i) * s.per_group());
        bool moved = false;
        for (std::size_t first = 0; first < s.channels; first += s.per_group()) {
            double sum = 0, squares = 0;
            for (std::size_t c = first; c < first + s.per_group(); ++c) sum += two[c], squares += two[s.channels + c];
            const double away = sum / count;
            if (away * away <= squares / count - away * away) continue;
            std::fill_n(&centre[first], s.per_group(), static_cast<float>(centre[first] + away));
            moved = true;
        }
        return moved;
    }

    // From its channels' sums around one centre, and what is added to each channel.
    Moments group_moments(std::size_t i, std::size_t first, float centre, const float* two) const {
        const double count = static_cast<double>(pixels(i));
        double sum = 0, squares = 0;
        for (std::size_t c = first; c < first + s.per_group(); ++c) {
            const double shift = in.shift(sample(i) * s.channels + c), its_sum = two[c];
            sum += its_sum + count * shift;
            squares += two[s.channels + c] + (2 * its_sum + count * shift) * shift;
        }
        return block_moments(count * static_cast<double>(s.per_group()), centre, 0.0f, sum, squares);
    }

    void merge_group(std::size_t n, std::size_t group, float* stats) {
        Moments total{0, 0, 0};
        for (std::size_t i = n * pieces; i < (n + 1) * pieces; ++i)
            total.merge(moments[i * s.groups + group]);
        if (!std::isfinite(total.squares)) total = wide_moments(in, s, n, group, 1, s.channels);
        const GroupStats found(total, in.eps);
        found.write(stats + n * 3 * s.groups + group, s.groups);
        float* to = &affine[n * 3 * s.channels];
        for (std::size_t c = group * s.per_group(); c < (group + 1) * s.per_group(); ++c) {
            const Affine f = found.affine(in.weight[c], in.bias[c], in.shift(n * s.channels + c));
            to[c] = f.centre, to[s.channels + c] = f.scale, to[2 * s.channels + c] = f.offset;
        }
    }

    void apply_piece(std::size_t i, float* out) const {
        const std::size_t at = offset(i);
        rows().norm->column_apply(in.x + at, in.full(at), pixels(i), s.channels, &affine[sample(i) * 3 * s.channels], in.silu,
                                  out + at);
    }
};

inline void group_norm_silu_channels_last(const NormInputs& in, const NormShape& s, float* out, float* stats) {
    ChannelsLast work(in, s);
    const std::size_t all = s.n * work.pieces;
    parallel_for(all, s.bytes(), [&](std::size_t i) { work.add_piece(i); });
    for (std::size_t i = 0; i < s.n * s.groups; ++i) work.merge_group(i / s.groups, i % s.groups, stats);
    // From the end: the caches still have what was read last.
    parallel_for(all, s.bytes(), [&](std::size_t i) { work.apply_piece(all - 1 - i, out); });
}

}  // namespace tintype
