// Our elements in CUTLASS's terms.
#pragma once

#include <cutlass/numeric_types.h>

#include "../gelu.cuh"

namespace llava_st::cuda {

template <class T>
struct CutlassElement;
template <>
struct CutlassElement<BFloat16> {
  using Type = cutlass::bfloat16_t;
};
template <>
struct CutlassElement<Float16> {
  using Type = cutlass::half_t;
};

template <class T>
const typename CutlassElement<T>::Type* in_cutlass(const T* data) {
  return reinterpret_cast<const typename CutlassElement<T>::Type*>(data);
}
template <class T>
typename CutlassElement<T>::Type* in_cutlass(T* data) {
  return reinterpret_cast<typename CutlassElement<T>::Type*>(data);
}

}  // namespace llava_st::cuda
