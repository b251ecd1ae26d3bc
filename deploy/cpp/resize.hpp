// Bilinear resize with antialiasing, the numbers of Pillow's Image.resize(BILINEAR).
#pragma once

#include <cstdint>
#include <vector>

struct Image {
    int height = 0, width = 0;
    std::vector<std::uint8_t> pixels;  // (height, width, 3), RGB
};

// Returns the image at another size; the aspect ratio is ignored.
Image resize(const Image& image, int height, int width);
