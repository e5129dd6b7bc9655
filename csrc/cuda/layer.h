// The CUDA backend's entry points: the whole loop of one layer and direction in one call. Kernels and library products
// are put on `stream`; nothing is allocated, nothing waits, and no value is read on the host.
#pragma once

#include "masks.cuh"
#include "plan.h"
#include "products.h"

namespace fusedreg::cuda {

// What the structs of params.h do not say of tensors whose values are on the device.
struct DeviceArguments {
  MaskSeed seed;                   // LayerInputs::seeds is unused
  int64_t running_rows = 0;        // rows that all running statistics of recurrent terms and cell have
  int64_t running_input_rows = 0;  // the same of the input terms. Indices are clamped to [-1, rows - 1]
};

// `choice` is of the same direction. `scratch` is as many bytes as the first of each pair asks for, aligned to 256, and
// may be used again as soon as what comes next on the stream.
size_t lstm_layer_forward_scratch(const ForwardParams& params, const Choice& choice);
void lstm_layer_forward(const ForwardParams& params, const DeviceArguments& device, const Choice& choice, void* scratch,
                        Products& products, void* stream);

// As params.h says, and `second_grad_bias`, where it is not null, receives what params.grad_bias does.
size_t lstm_layer_backward_scratch(const BackwardParams& params, const Choice& choice);
void lstm_layer_backward(const BackwardParams& params, void* second_grad_bias, const DeviceArguments& device,
                         const Choice& choice, void* scratch, Products& products, void* stream);

}  // namespace fusedreg::cuda
