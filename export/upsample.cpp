// Upsamples a low-resolution face with an exported model: an example for programs in C++. Faces come and go as PPM, the
// simplest of pictures: magick face.png face.ppm
//
//   g++ -std=c++17 -O2 export/upsample.cpp -I "$ORT/include" -L "$ORT/lib" -lonnxruntime -o upsample
//   ./upsample upsampler.onnx face.ppm result.ppm
//
// ORT is a release of onnxruntime, unpacked. The result is the point estimate, 1.png of infer.py.

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

struct Picture {  // three planes in [-1, 1]
  int64_t size = 0;
  std::vector<float> planes;
};

Picture read_ppm(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string kind;
  int width = 0, height = 0, most = 0;
  file >> kind >> width >> height >> most;
  if (!file || kind != "P6" || width != height || width < 1 || width > 4096 || most != 255)
    throw std::runtime_error(path + ": expected a square binary PPM of 8 bit");
  file.get();
  const size_t count = size_t(width) * height;
  std::vector<unsigned char> bytes(3 * count);
  if (!file.read(reinterpret_cast<char*>(bytes.data()), std::streamsize(bytes.size())))
    throw std::runtime_error(path + ": ends early");
  Picture image{width, std::vector<float>(bytes.size())};
  for (size_t i = 0; i < bytes.size(); ++i) image.planes[i % 3 * count + i / 3] = bytes[i] / 127.5f - 1;
  return image;
}

void write_ppm(const float* planes, int64_t size, const std::string& path) {
  const size_t count = size_t(size * size);
  std::vector<char> bytes(3 * count);
  for (size_t i = 0; i < bytes.size(); ++i)
    bytes[i] = char(static_cast<unsigned char>(std::nearbyint(planes[i % 3 * count + i / 3] * 127.5f + 127.5f)));
  std::ofstream file(path, std::ios::binary);
  file << "P6\n" << size << ' ' << size << "\n255\n";
  file.write(bytes.data(), std::streamsize(bytes.size()));
  if (!file) throw std::runtime_error(path + ": cannot be written");
}

// Zeros (or another value) of an input's own shape, in which any size is 1. `values` has to outlive the tensor.
Ort::Value constant(Ort::Session& model, size_t input, std::vector<float>& values, float value = 0) {
  std::vector<int64_t> shape = model.GetInputTypeInfo(input).GetTensorTypeAndShapeInfo().GetShape();
  size_t count = 1;
  for (int64_t& side : shape) count *= size_t(side = std::max<int64_t>(side, 1));
  values.assign(count, value);
  auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  return Ort::Value::CreateTensor<float>(memory, values.data(), count, shape.data(), shape.size());
}

void upsample(Ort::Session& model, Picture& face, const std::string& result) {
  auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  const int64_t lr[] = {1, 3, face.size, face.size}, one[] = {1};
  bool preserve_lr = false;
  std::vector<float> noise, fidelity, sigma, edit;
  std::vector<Ort::Value> inputs;
  inputs.push_back(Ort::Value::CreateTensor<float>(memory, face.planes.data(), face.planes.size(), lr, 4));
  inputs.push_back(constant(model, 1, noise));         // (1, 1, E), of the point estimate
  inputs.push_back(constant(model, 2, fidelity, 1));
  inputs.push_back(constant(model, 3, sigma, -1));     // grey levels; negative: estimated
  inputs.push_back(constant(model, 4, edit));          // (1, L, D)
  inputs.push_back(Ort::Value::CreateTensor<bool>(memory, &preserve_lr, 1, one, 1));
  const char* names[] = {"lr", "noise", "fidelity", "sigma", "edit", "preserve_lr"};
  const char* wanted[] = {"images", "lr_psnr"};
  auto found = model.Run(Ort::RunOptions{}, names, inputs.data(), 6, wanted, 2);  // (1, 1, 3, R, R), (1, 1)
  write_ppm(found[0].GetTensorData<float>(), found[0].GetTensorTypeAndShapeInfo().GetShape()[4], result);
  std::cout << "LR-PSNR " << *found[1].GetTensorData<float>() << " dB\n";
}

int main(int count, char** arguments) {
  if (count != 4) {
    std::cerr << "usage: upsample MODEL.onnx FACE.ppm RESULT.ppm\n";
    return 2;
  }
  try {
    Picture face = read_ppm(arguments[2]);
    Ort::Env environment(ORT_LOGGING_LEVEL_ERROR);
    Ort::Session model(environment, arguments[1], Ort::SessionOptions{});
    upsample(model, face, arguments[3]);
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
}
