// Upsamples a low-resolution face with the exported models: an example for programs in C++. Faces come and go as PPM,
// the simplest of pictures: magick face.png face.ppm
//
//   g++ -std=c++17 -O2 export/upsample.cpp -I "$ORT/include" -L "$ORT/lib" -lonnxruntime -o upsample
//   ./upsample exported face.ppm best.ppm
//
// ORT is a release of onnxruntime, unpacked. The result is the best guess, as 1.png of export.run.

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <fstream>
#include <iostream>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

struct Picture {  // three planes in [-1, 1]
  int size = 0;
  std::vector<float> planes;
};

// The matrix A (size_out, size_in) that resizes a row of pixels, y = A x; see data/taps.py.
std::vector<float> resize_weights(int size_in, int size_out) {
  auto cubic = [](double x) {
    x = std::abs(x);
    if (x <= 1) return (1.5 * x - 2.5) * x * x + 1;
    return x < 2 ? -0.5 * (((x - 5) * x + 8) * x - 4) : 0.0;
  };
  const double factor = double(size_in) / size_out, stretch = std::max(factor, 1.0);
  const bool odd = size_in > size_out && size_in % (2 * size_out) == size_out;
  const int taps = int(std::ceil(4 * stretch)) + 1, period = std::max(2 * (size_in - 1), 1);
  std::vector<float> matrix(size_t(size_out) * size_in, 0.0f);
  for (int o = 0; o < size_out; ++o) {
    const double centre = (o + 0.5) * factor - 0.5 + (odd ? 0.5 : 0.0);
    const int first = int(std::ceil(centre - 2 * stretch));
    std::vector<double> row(size_in, 0.0);
    double sum = 0;
    for (int i = first; i < first + taps; ++i) {
      const double weight = cubic((i - centre) / stretch);
      const int folded = ((i % period) + period) % period;
      row[size_in == 1 ? 0 : std::min(folded, period - folded)] += weight;
      sum += weight;
    }
    for (int p = 0; p < size_in; ++p) matrix[size_t(o) * size_in + p] = float(row[p] / sum);
  }
  return matrix;
}

// A x Aᵀ for each colour.
Picture resize(const Picture& image, int size) {
  const int n = image.size;
  const std::vector<float> a = resize_weights(n, size);
  Picture out{size, std::vector<float>(size_t(3) * size * size)};
  for (int c = 0; c < 3; ++c) {
    std::vector<double> narrow(size_t(n) * size, 0.0);  // (n, size)
    for (int y = 0; y < n; ++y)
      for (int o = 0; o < size; ++o)
        for (int x = 0; x < n; ++x) narrow[size_t(y) * size + o] += a[size_t(o) * n + x] * image.planes[(size_t(c) * n + y) * n + x];
    for (int o = 0; o < size; ++o)
      for (int x = 0; x < size; ++x) {
        double sum = 0;
        for (int y = 0; y < n; ++y) sum += a[size_t(o) * n + y] * narrow[size_t(y) * size + x];
        out.planes[(size_t(c) * size + o) * size + x] = float(sum);
      }
  }
  return out;
}

Picture read_ppm(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string kind;
  int width = 0, height = 0, most = 0;
  file >> kind >> width >> height >> most;
  if (!file || kind != "P6" || width != height || width < 1 || width > 4096 || most != 255)
    throw std::runtime_error(path + ": expected a square binary PPM of 8 bit");
  file.get();
  std::vector<unsigned char> bytes(size_t(3) * width * height);
  if (!file.read(reinterpret_cast<char*>(bytes.data()), std::streamsize(bytes.size()))) throw std::runtime_error(path + ": ends early");
  Picture image{width, std::vector<float>(bytes.size())};
  const size_t count = size_t(width) * height;
  for (size_t i = 0; i < count; ++i)
    for (size_t c = 0; c < 3; ++c) image.planes[c * count + i] = bytes[3 * i + c] / 127.5f - 1;
  return image;
}

void write_ppm(const Picture& image, const std::string& path) {
  const size_t count = size_t(image.size) * image.size;
  std::vector<unsigned char> bytes(3 * count);
  for (size_t i = 0; i < count; ++i)
    for (size_t c = 0; c < 3; ++c) {
      const float clamped = std::clamp(image.planes[c * count + i], -1.0f, 1.0f);
      bytes[3 * i + c] = static_cast<unsigned char>(std::nearbyint(clamped * 127.5f + 127.5f));
    }
  std::ofstream file(path, std::ios::binary);
  file << "P6\n" << image.size << ' ' << image.size << "\n255\n";
  file.write(reinterpret_cast<const char*>(bytes.data()), std::streamsize(bytes.size()));
  if (!file) throw std::runtime_error(path + ": cannot be written");
}

// A size that a model's file holds, such as "canvas". Older files lack some; a fallback of 0 or more stands for those.
int size_in_file(Ort::Session& session, const char* name, int fallback = -1) {
  Ort::AllocatorWithDefaultOptions allocator;
  auto text = session.GetModelMetadata().LookupCustomMetadataMapAllocated(name, allocator);
  if (!text && fallback >= 0) return fallback;
  if (!text) throw std::runtime_error(std::string("the model says nothing of its ") + name);
  return std::stoi(text.get());
}

// A tensor that looks into values, which have to outlive it.
Ort::Value tensor(std::vector<float>& values, std::vector<int64_t> shape) {
  static const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  return Ort::Value::CreateTensor<float>(memory, values.data(), values.size(), shape.data(), shape.size());
}

std::vector<float> values_of(const Ort::Value& value) {
  const float* first = value.GetTensorData<float>();
  return {first, first + value.GetTensorTypeAndShapeInfo().GetElementCount()};
}

Picture generate(Ort::Session& generator, std::vector<float>& ws, const std::vector<int64_t>& shape) {
  const char* in[] = {"ws"};
  const char* out[] = {"images"};
  Ort::Value input = tensor(ws, shape);
  auto drawn = generator.Run(Ort::RunOptions{}, in, &input, 1, out, 1);  // (1, 3, R, R)
  return {int(drawn[0].GetTensorTypeAndShapeInfo().GetShape()[3]), values_of(drawn[0])};
}

// What the image, downscaled, lacks of the face.
Picture missing(const Picture& face, const Picture& image) {
  Picture rest = resize(image, face.size);
  for (size_t i = 0; i < rest.planes.size(); ++i) rest.planes[i] = face.planes[i] - rest.planes[i];
  return rest;
}

double downscaling_error(const Picture& face, Picture image) {
  for (float& value : image.planes) value = std::min(1.0f, std::max(-1.0f, value));
  const Picture rest = missing(face, image);
  double sum = 0;
  for (float value : rest.planes) sum += double(value) * value / 4;
  return sum / double(rest.planes.size());
}

// One pass of feedback.onnx: better codes.
std::vector<float> correct(Ort::Session& feedback, const Picture& face, const Picture& image, std::vector<float>& ws,
                           const std::vector<int64_t>& shape) {
  const int64_t canvas = size_in_file(feedback, "feedback_canvas");
  Picture lr = resize(face, int(canvas)), residual = resize(missing(face, image), int(canvas));
  Picture seen = image.size == 2 * canvas ? image : resize(image, int(2 * canvas));
  std::vector<float> size{float(face.size)};
  std::array<Ort::Value, 5> inputs{tensor(lr.planes, {1, 3, canvas, canvas}), tensor(residual.planes, {1, 3, canvas, canvas}),
                                   tensor(seen.planes, {1, 3, 2 * canvas, 2 * canvas}), tensor(size, {1}), tensor(ws, shape)};
  const char* in[] = {"lr", "residual", "images", "lr_size", "ws"};
  const char* out[] = {"moved"};
  return values_of(feedback.Run(Ort::RunOptions{}, in, inputs.data(), 5, out, 1)[0]);
}

// The passes of learned feedback: a correction that makes things worse is taken back and halved, see export/passes.py.
Picture take_passes(Ort::Session& feedback, Ort::Session& generator, const Picture& face, std::vector<float> ws,
                    const std::vector<int64_t>& shape, int passes) {
  Picture image = generate(generator, ws, shape);
  double error = downscaling_error(face, image);
  float length = 1;
  for (int pass = 0; pass < passes; ++pass) {
    std::vector<float> moved = correct(feedback, face, image, ws, shape);
    for (size_t i = 0; i < ws.size(); ++i) moved[i] = ws[i] + length * (moved[i] - ws[i]);
    Picture drawn = generate(generator, moved, shape);
    const double found = downscaling_error(face, drawn);
    if (found < error) {
      ws = moved, image = drawn, error = found;
    } else {
      length /= 2;
    }
  }
  return image;
}

// The best guess; feedback is null where the models have none.
Picture upsample(Ort::Session& encoder, Ort::Session& generator, Ort::Session* feedback, const Picture& face) {
  const int64_t canvas = size_in_file(encoder, "canvas");
  const int64_t width = size_in_file(encoder, "noise_dim", size_in_file(encoder, "w_dim"));
  Picture enlarged = resize(face, int(canvas));
  std::vector<float> size{float(face.size)}, noise(size_t(width), 0.0f);  // the best guess does not look at the noise
  std::array<Ort::Value, 3> inputs{tensor(enlarged.planes, {1, 3, canvas, canvas}), tensor(size, {1}), tensor(noise, {1, 1, width})};
  const char* names[] = {"canvas", "lr_size", "noise"};
  const char* best[] = {"best"};
  auto codes = encoder.Run(Ort::RunOptions{}, names, inputs.data(), 3, best, 1);  // (1, L, D)
  const auto shape = codes[0].GetTensorTypeAndShapeInfo().GetShape();
  std::vector<float> ws = values_of(codes[0]);
  if (!feedback) return generate(generator, ws, shape);
  return take_passes(*feedback, generator, face, ws, shape, size_in_file(encoder, "passes"));
}

int main(int count, char** arguments) {
  if (count != 4) {
    std::cerr << "usage: upsample MODELS FACE.ppm RESULT.ppm\n";
    return 2;
  }
  try {
    const std::string models = arguments[1];
    const Picture face = read_ppm(arguments[2]);
    Ort::Env environment(ORT_LOGGING_LEVEL_ERROR);  // warnings would say that noise maps may be replaced, as they should
    Ort::SessionOptions options;
    options.AddConfigEntry("session.force_spinning_stop", "1");  // the models take turns: none may hold the processor
    Ort::Session encoder(environment, (models + "/encoder.onnx").c_str(), options);
    Ort::Session generator(environment, (models + "/generator.onnx").c_str(), options);
    std::unique_ptr<Ort::Session> feedback;
    if (size_in_file(encoder, "passes", 0) > 0)
      feedback = std::make_unique<Ort::Session>(environment, (models + "/feedback.onnx").c_str(), options);
    write_ppm(upsample(encoder, generator, feedback.get(), face), arguments[3]);
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
}
