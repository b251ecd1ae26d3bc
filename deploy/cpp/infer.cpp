// Runs an exported bundle on images and prints what deploy/infer.py prints: verdict and score.
// usage: flowad_infer BUNDLE IMAGE... [--cpu_threads N]
// exit:  0, or 2 with one line on stderr after a mistake

#define STB_IMAGE_IMPLEMENTATION
#include <stb_image.h>
#include <yaml-cpp/yaml.h>

#include <cstdio>
#include <filesystem>
#include <iostream>
#include <openvino/openvino.hpp>
#include <stdexcept>
#include <string>
#include <vector>

#include "resize.hpp"

namespace {

struct Mistake : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct Bundle {
    std::string model;
    int height = 0, width = 0;
    double threshold = 0;
};

Bundle read_bundle(const std::filesystem::path& folder) {
    const auto sidecar = folder / "inference.yml";
    const auto model = folder / "model.onnx";
    if (!std::filesystem::exists(sidecar)) {
        throw Mistake(folder.string() + ": no inference.yml here; export with deploy/export_model.py");
    }
    if (!std::filesystem::exists(model)) {
        throw Mistake(folder.string() + ": no model.onnx here; export again with --onnx");
    }
    try {
        const YAML::Node about = YAML::LoadFile(sidecar.string());
        if (about["format"].as<int>() != 1) throw Mistake(sidecar.string() + ": unknown format");
        const auto policy = about["thresholds"]["image"]["policy"].as<std::string>();
        if (policy == "nfa") {
            throw Mistake(sidecar.string() + ": its threshold is an NFA test; use deploy/infer.py");
        }
        if (about["quantization"]) {
            throw Mistake(sidecar.string() + ": quantized for ONNX Runtime; use deploy/infer.py");
        }
        const auto method = about["input"]["resize"].as<std::string>();
        if (method != "pil") {
            throw Mistake(sidecar.string() + ": resize '" + method + "'; this program knows pil");
        }
        Bundle bundle;
        bundle.model = model.string();
        bundle.height = about["input"]["size"][0].as<int>();
        bundle.width = about["input"]["size"][1].as<int>();
        bundle.threshold = about["thresholds"]["image"]["value"].as<double>();
        return bundle;
    } catch (const YAML::Exception& error) {
        throw Mistake(sidecar.string() + ": " + error.what() + "; export again");
    }
}

Image read_image(const std::string& path) {
    Image image;
    int channels = 0;
    if (stbi_is_16_bit(path.c_str())) {
        throw Mistake(path + ": 16 bits per channel; save it with 8, or use deploy/infer.py");
    }
    stbi_uc* pixels = stbi_load(path.c_str(), &image.width, &image.height, &channels, 3);
    if (pixels == nullptr) throw Mistake(path + ": cannot be read: " + stbi_failure_reason());
    image.pixels.assign(pixels, pixels + static_cast<std::size_t>(image.height) * image.width * 3);
    stbi_image_free(pixels);
    return image;
}

// Fills a tensor (1, 3, H, W) with an image in [0, 1].
void fill(const Image& image, float* values) {
    const std::size_t area = static_cast<std::size_t>(image.height) * image.width;
    for (std::size_t i = 0; i < area; ++i) {
        for (std::size_t channel = 0; channel < 3; ++channel) {
            values[channel * area + i] = image.pixels[3 * i + channel] / 255.0F;
        }
    }
}

int number(const std::string& text) {
    try {
        std::size_t end = 0;
        const int value = std::stoi(text, &end);
        if (end == text.size() && value > 0) return value;
    } catch (const std::exception&) {
    }
    throw Mistake("--cpu_threads " + text + ": must be a whole number from 1");
}

void run(const std::vector<std::string>& words) {
    std::vector<std::string> names;
    int threads = 1;
    for (std::size_t i = 0; i < words.size(); ++i) {
        if (words[i] == "--cpu_threads" && i + 1 < words.size()) {
            threads = number(words[++i]);
        } else {
            names.push_back(words[i]);
        }
    }
    if (names.size() < 2) throw Mistake("usage: flowad_infer BUNDLE IMAGE... [--cpu_threads N]");
    const Bundle bundle = read_bundle(names[0]);
    ov::Core core;
    auto model = core.compile_model(bundle.model, "CPU",
                                    ov::inference_num_threads(threads),
                                    ov::hint::inference_precision(ov::element::f32),
                                    ov::hint::performance_mode(ov::hint::PerformanceMode::LATENCY));
    auto request = model.create_infer_request();
    const ov::Shape shape{1, 3, static_cast<std::size_t>(bundle.height),
                          static_cast<std::size_t>(bundle.width)};
    ov::Tensor input(ov::element::f32, shape);
    for (std::size_t i = 1; i < names.size(); ++i) {
        fill(resize(read_image(names[i]), bundle.height, bundle.width), input.data<float>());
        request.set_tensor("image", input);
        request.infer();
        const float score = request.get_tensor("score").data<float>()[0];
        std::printf("%s - score:  %.6f  %s\n", score > bundle.threshold ? "Anomaly" : "Normal",
                    static_cast<double>(score), names[i].c_str());
    }
}

}  // namespace

int main(int argc, char** argv) {
    try {
        run({argv + 1, argv + argc});
    } catch (const std::exception& error) {
        std::cerr << "error: " << error.what() << std::endl;
        return 2;
    }
    return 0;
}
