// Philox4x32-10 (Salmon et al., SC 2011). The Python reference in philox.py is the specification.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace tintype {

using Block = std::array<std::uint32_t, 4>;

inline Block philox4x32(Block counter, std::uint64_t seed) {
    auto key0 = static_cast<std::uint32_t>(seed);
    auto key1 = static_cast<std::uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const std::uint64_t product0 = std::uint64_t{0xD2511F53} * counter[0];
        const std::uint64_t product1 = std::uint64_t{0xCD9E8D57} * counter[2];
        counter = {static_cast<std::uint32_t>(product1 >> 32) ^ counter[1] ^ key0,
                   static_cast<std::uint32_t>(product1),
                   static_cast<std::uint32_t>(product0 >> 32) ^ counter[3] ^ key1,
                   static_cast<std::uint32_t>(product0)};
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return counter;
}

inline void philox_fill(std::uint32_t* out, std::size_t count, std::uint64_t seed, std::uint32_t step,
                        std::uint32_t stream, std::uint64_t first_block) {
    for (std::size_t start = 0; start < count; start += 4) {
        const std::uint64_t block = first_block + start / 4;
        const Block words = philox4x32(
            {static_cast<std::uint32_t>(block), static_cast<std::uint32_t>(block >> 32), step, stream}, seed);
        for (std::size_t word = 0; word < 4 && start + word < count; ++word) out[start + word] = words[word];
    }
}

}  // namespace tintype
