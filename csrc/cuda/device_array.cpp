#include "cuda/device_array.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "core/check.h"
#include "cuda/error.h"

namespace mxmoe {
namespace cuda {
namespace {

std::string text_of(const std::vector<int64_t>& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) text += (i > 0 ? ", " : "") + std::to_string(shape[i]);
  return text + (shape.size() == 1 ? ",)" : ")");
}

Tensor contiguous(const std::vector<int64_t>& shape, DType dtype, const char* what) {
  check_value(!shape.empty() && shape.size() <= static_cast<size_t>(kMaxDims), what, " has shape ", text_of(shape),
              "; wanted 1 to ", kMaxDims, " axes");
  Tensor t;
  t.dtype = dtype, t.ndim = static_cast<int>(shape.size());
  int64_t size = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    const int64_t n = shape[static_cast<size_t>(i)];
    check_value(n >= 0, what, " has shape ", text_of(shape), "; wanted sizes of 0 or more");
    t.shape[i] = n, t.stride[i] = size;
    constexpr int64_t kMost = std::numeric_limits<int64_t>::max() / 8;
    check_value(n == 0 || size <= kMost / n, what, " has shape ", text_of(shape), ", more than memory can hold");
    size *= n > 0 ? n : 1;
  }
  return t;
}

size_t num_bytes(const Tensor& t) { return static_cast<size_t>(t.size()) * static_cast<size_t>(dtype_size(t.dtype)); }

// Rows of the innermost run without gaps, and how many such rows follow each other at one distance.
struct Runs {
  size_t width, pitch, count;
};

Runs runs_of(const Tensor& t, const char* what) {
  const auto item = static_cast<size_t>(dtype_size(t.dtype));
  int axis = t.ndim - 1;
  int64_t run = 1;
  while (axis >= 0 && (t.shape[axis] == 1 || t.stride[axis] == run)) run *= t.shape[axis--];
  if (axis < 0) return {static_cast<size_t>(run) * item, static_cast<size_t>(run) * item, 1};
  const int64_t pitch = t.stride[axis];
  int64_t count = t.shape[axis];
  for (int i = axis - 1; i >= 0; --i) {
    check_value(t.shape[i] == 1 || t.stride[i] == pitch * count, what,
                " has gaps on several axes; wanted rows at "
                "one distance");
    count *= t.shape[i];
  }
  return {static_cast<size_t>(run) * item, static_cast<size_t>(pitch) * item, static_cast<size_t>(count)};
}

dlpack::DataType dlpack_dtype(DType dtype) {
  const auto bits = static_cast<uint8_t>(8 * dtype_size(dtype));
  switch (dtype) {
    case DType::f32:
    case DType::f64:
      return {dlpack::kFloat, bits, 1};
    case DType::bf16:
      return {dlpack::kBfloat, bits, 1};
    case DType::u8:
      return {dlpack::kUInt, bits, 1};
    default:
      return {dlpack::kInt, bits, 1};
  }
}

dlpack::Array describe(DeviceArray& array) {
  return {array.tensor.data,
          {dlpack::kCuda, array.device},
          array.tensor.ndim,
          dlpack_dtype(array.tensor.dtype),
          array.tensor.shape,
          array.tensor.stride,
          0};
}

// What an export points to: the array itself lives on in the context.
template <typename Managed>
Managed* exported(const DeviceArray& array) {
  if (array.memory) array.memory->share();
  auto* kept = new DeviceArray(array);
  auto* managed = new Managed{};
  managed->array = describe(*kept);
  managed->context = kept;
  managed->deleter = [](Managed* self) {
    delete static_cast<DeviceArray*>(self->context);
    delete self;
  };
  return managed;
}

}  // namespace

DeviceArray allocate(const std::shared_ptr<Stream>& stream, const std::vector<int64_t>& shape, DType dtype,
                     const char* what) {
  DeviceArray array;
  array.tensor = contiguous(shape, dtype, what), array.device = stream->device();
  array.memory = std::make_shared<Memory>(stream, num_bytes(array.tensor), what);
  array.tensor.data = array.memory->data();
  return array;
}

DeviceArray allocate(const std::shared_ptr<Arena>& arena, int device, const std::vector<int64_t>& shape, DType dtype,
                     const char* what) {
  DeviceArray array;
  array.tensor = contiguous(shape, dtype, what), array.device = device;
  array.tensor.data = arena->allocate(num_bytes(array.tensor), what);
  array.owner = arena;
  return array;
}

DeviceArray allocate(Pool& pool, const std::vector<int64_t>& shape, DType dtype, const char* what) {
  DeviceArray array;
  array.tensor = contiguous(shape, dtype, what), array.device = pool.device();
  array.owner = pool.take(num_bytes(array.tensor), what);
  array.tensor.data = array.owner.get();
  return array;
}

DeviceArray host_array(const std::shared_ptr<Stream>& stream, const std::vector<int64_t>& shape, DType dtype,
                       const char* what) {
  DeviceArray array;
  array.tensor = contiguous(shape, dtype, what), array.device = stream->device();
  const DeviceGuard guard(stream->device());
  // With one address for host and device, as all of CUDA's 64-bit platforms have.
  void* memory = nullptr;
  const size_t bytes = std::max(num_bytes(array.tensor), size_t{1});
  MXMOE_CUDA(cudaMallocHost(&memory, bytes));
  std::memset(memory, 0, bytes);
  array.owner = std::shared_ptr<void>(memory, [stream](void* p) {
    cudaStreamSynchronize(stream->handle());
    cudaFreeHost(p);
  });
  array.tensor.data = memory;
  return array;
}

DeviceArray reshape(const DeviceArray& array, const std::vector<int64_t>& shape) {
  check_contiguous("array", array.tensor);
  std::vector<int64_t> sizes = shape;
  int64_t known = 1, unknown = -1;
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] == -1 && unknown < 0) {
      unknown = static_cast<int64_t>(i);
    } else {
      check_value(sizes[i] >= 0, "shape is ", text_of(shape), "; wanted sizes of 0 or more and at most one -1");
      known *= sizes[i];
    }
  }
  const int64_t size = array.tensor.size();
  if (unknown >= 0) {
    check_value(known > 0 && size % known == 0, "an array of shape ", shape_string(array.tensor),
                " does not fit into shape ", text_of(shape));
    sizes[static_cast<size_t>(unknown)] = size / known;
  }
  DeviceArray view = array;
  view.tensor = contiguous(sizes, array.tensor.dtype, "shape");
  check_value(view.tensor.size() == size, "an array of shape ", shape_string(array.tensor),
              " does not fit into shape ", text_of(shape));
  view.tensor.data = array.tensor.data;
  return view;
}

void to_host(Stream& stream, const DeviceArray& array, void* host) {
  check_value(!stream.capturing(), "the array cannot be read while a graph is captured");
  if (array.tensor.size() > 0) {
    const DeviceGuard guard(stream.device());
    const Runs runs = runs_of(array.tensor, "the array");
    MXMOE_CUDA(cudaMemcpy2DAsync(host, runs.width, array.tensor.data, runs.pitch, runs.width, runs.count,
                                 cudaMemcpyDeviceToHost, stream.handle()));
  }
  stream.synchronize();
}

void from_host(Stream& stream, const DeviceArray& array, const void* host) {
  check_value(!stream.capturing(), "the array cannot be filled while a graph is captured");
  check_value(!array.read_only, "the array is read-only; wanted a writable one");
  if (array.tensor.size() > 0) {
    const DeviceGuard guard(stream.device());
    const Runs runs = runs_of(array.tensor, "the array");
    MXMOE_CUDA(cudaMemcpy2DAsync(array.tensor.data, runs.pitch, host, runs.width, runs.width, runs.count,
                                 cudaMemcpyHostToDevice, stream.handle()));
  }
  stream.synchronize();
}

void copy_on_device(Stream& stream, const DeviceArray& from, const DeviceArray& to) {
  if (from.tensor.size() == 0) return;
  const DeviceGuard guard(stream.device());
  const Runs runs = runs_of(from.tensor, "the array");
  MXMOE_CUDA(cudaMemcpy2DAsync(to.tensor.data, runs.width, from.tensor.data, runs.pitch, runs.width, runs.count,
                               cudaMemcpyDeviceToDevice, stream.handle()));
}

dlpack::ManagedVersioned* export_versioned(const DeviceArray& array) {
  auto* managed = exported<dlpack::ManagedVersioned>(array);
  managed->version = {1, 0};
  managed->flags = array.read_only ? dlpack::kReadOnly : 0;
  return managed;
}

dlpack::Managed* export_unversioned(const DeviceArray& array) {
  check_value(!array.read_only, "the array is read-only, which DLPack can say from version 1 on only");
  return exported<dlpack::Managed>(array);
}

}  // namespace cuda
}  // namespace mxmoe
