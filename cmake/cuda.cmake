# The CUDA library. It compiles against a torch without CUDA too, so that it can be built and checked where no GPU is.
if(LLAVA_ST_CUDA STREQUAL "off")
  message(STATUS "llava_st_ops: no CUDA library (LLAVA_ST_CUDA=off)")
  return()
endif()

include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(LLAVA_ST_CUDA STREQUAL "on")
    message(FATAL_ERROR "llava_st_ops: LLAVA_ST_CUDA=on, but no nvcc was found that works with ${CMAKE_CXX_COMPILER}")
  endif()
  message(STATUS "llava_st_ops: no CUDA library: no nvcc was found that works with ${CMAKE_CXX_COMPILER}")
  return()
endif()

set(CMAKE_CUDA_ARCHITECTURES "${LLAVA_ST_CUDA_ARCHS}")
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
enable_language(CUDA)

# Three shims (current stream, error text) live in libtorch_cuda.so. A CPU-only torch has no such file: an empty one of
# the same name stands in, so that the loader finds the real one wherever the library is used.
if(NOT EXISTS "${LLAVA_ST_TORCH_DIR}/lib/libtorch_cuda.so")
  file(WRITE "${CMAKE_BINARY_DIR}/empty.cpp" "")
  add_library(torch_cuda SHARED "${CMAKE_BINARY_DIR}/empty.cpp")
endif()

file(GLOB LLAVA_ST_CUDA_SOURCES CONFIGURE_DEPENDS csrc/cuda/*.cu csrc/cuda/*/*.cu)
add_library(llava_st_cuda MODULE ${LLAVA_ST_CUDA_SOURCES})
set_target_properties(llava_st_cuda PROPERTIES
  CUDA_RUNTIME_LIBRARY Static  # the driver is all that has to be there
  CUDA_VISIBILITY_PRESET hidden)
target_link_libraries(llava_st_cuda PRIVATE torch_stable torch_cuda)
target_link_options(llava_st_cuda PRIVATE -Wl,--no-as-needed)
target_compile_definitions(llava_st_cuda PRIVATE USE_CUDA)
include(cmake/cutlass.cmake)
string(REPLACE ";" "," architectures "${LLAVA_ST_CUDA_ARCHS}")  # a shell would end the command at a semicolon
set_source_files_properties(csrc/cuda/library.cu PROPERTIES COMPILE_DEFINITIONS
  "LLAVA_ST_CUDA_ARCHITECTURES=\"${architectures}\";LLAVA_ST_CUTLASS_MISSING=\"${LLAVA_ST_CUTLASS_MISSING}\"")
install(TARGETS llava_st_cuda LIBRARY DESTINATION .)
