#include "resize.hpp"

#include <algorithm>
#include <cmath>

namespace {

constexpr int kChannels = 3;
constexpr int kBits = 32 - 8 - 2;  // of a weight's fraction: sums of 8-bit values stay below 2^31

struct Taps {
    int first = 0;                // index of the first source pixel
    std::vector<int> weights;     // fixed point
};

// The weights of every target pixel along one axis: a triangle as wide as a target pixel, in the
// source at least one pixel wide to either side.
std::vector<Taps> taps(int source, int target) {
    const double scale = static_cast<double>(source) / target;
    const double reach = std::max(scale, 1.0);
    std::vector<Taps> all(target);
    for (int i = 0; i < target; ++i) {
        const double centre = (i + 0.5) * scale;
        const int first = std::max(0, static_cast<int>(centre - reach + 0.5));
        const int last = std::min(source, static_cast<int>(centre + reach + 0.5));
        std::vector<double> values;
        double total = 0;
        for (int x = first; x < last; ++x) {
            values.push_back(std::max(0.0, 1.0 - std::abs((x + 0.5 - centre) / reach)));
            total += values.back();
        }
        all[i].first = first;
        for (double value : values) {
            all[i].weights.push_back(static_cast<int>(value / total * (1 << kBits) + 0.5));
        }
    }
    return all;
}

std::uint8_t rounded(int sum) {
    return static_cast<std::uint8_t>(std::clamp((sum + (1 << (kBits - 1))) >> kBits, 0, 255));
}

// Resizes one axis: `outer` blocks of (source, inner) values become (target, inner).
std::vector<std::uint8_t> along(const std::vector<std::uint8_t>& values, int outer, int source,
                                int inner, int target) {
    if (source == target) return values;
    const auto all = taps(source, target);
    std::vector<std::uint8_t> found(static_cast<std::size_t>(outer) * target * inner);
    for (int block = 0; block < outer; ++block) {
        const std::uint8_t* from = values.data() + static_cast<std::size_t>(block) * source * inner;
        std::uint8_t* to = found.data() + static_cast<std::size_t>(block) * target * inner;
        for (int i = 0; i < target; ++i) {
            for (int k = 0; k < inner; ++k) {
                int sum = 0;
                for (std::size_t t = 0; t < all[i].weights.size(); ++t) {
                    sum += all[i].weights[t] * from[(all[i].first + t) * inner + k];
                }
                to[i * inner + k] = rounded(sum);
            }
        }
    }
    return found;
}

}  // namespace

Image resize(const Image& image, int height, int width) {
    Image found;
    found.height = height;
    found.width = width;
    const auto narrow = along(image.pixels, image.height, image.width, kChannels, width);
    found.pixels = along(narrow, 1, image.height, width * kChannels, height);
    return found;
}
