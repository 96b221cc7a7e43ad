// The part of the DLPack 1.3 standard that reads a tensor object without copying, locking or
// keeping it, and makes one from memory: its C exchange interface, which array libraries publish as
// the capsule `__dlpack_c_exchange_api__` on their tensor type. Layouts as the standard gives them.
#pragma once
#include <cstdint>

namespace dlpack {

struct Version {
  uint32_t major, minor;
};

struct Device {
  int32_t type;  // kCpu, kCuda, kRocm
  int32_t id;
};
constexpr int32_t kCpu = 1, kCuda = 2, kRocm = 10;

struct DataType {
  uint8_t code;  // kInt, kFloat, kBFloat
  uint8_t bits;
  uint16_t lanes;
};
constexpr uint8_t kInt = 0, kFloat = 2, kBFloat = 4;

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; may be null for a contiguous tensor
  uint64_t byte_offset;
};

// A tensor with the memory that it owns.
struct ManagedTensor {
  Version version;
  void* manager_context;
  void (*deleter)(ManagedTensor* self);
  uint64_t flags;
  Tensor tensor;
};

struct ExchangeApi {
  Version version;
  void* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_object;
  int (*managed_tensor_to_object)(ManagedTensor* tensor, void** out_object);  // the object owns the tensor from then on
  int (*tensor_from_object)(void* object, Tensor* out);  // borrows: valid while the object lives and is not changed
  void* current_work_stream;
};

}  // namespace dlpack
