# Products by CUTLASS (csrc/cuda/linear_lape_gelu/cutlass), where its headers are. `pip install nvidia-cutlass` has them;
# they are needed for the build alone. Each architecture's files are compiled for it and for no other.
set(LLAVA_ST_CUTLASS_MISSING "")
if(LLAVA_ST_CUTLASS_DIR STREQUAL "")
  set(LLAVA_ST_CUTLASS_MISSING "nvidia-cutlass was not installed")
elseif(LLAVA_ST_CUTLASS_DIR STREQUAL "off")
  set(LLAVA_ST_CUTLASS_MISSING "LLAVA_ST_CUTLASS_DIR=off")
elseif(NOT EXISTS "${LLAVA_ST_CUTLASS_DIR}/include/cutlass/epilogue/fusion/sm90_visitor_tma_warpspecialized.hpp")
  message(FATAL_ERROR "LLAVA_ST_CUTLASS_DIR='${LLAVA_ST_CUTLASS_DIR}' is no CUTLASS 3.4 or later: "
                      "include/cutlass/epilogue/fusion/sm90_visitor_tma_warpspecialized.hpp is missing there")
endif()

# mma.m16n8k16, which all have from 8.0 on; but data centres' Blackwell multiplies otherwise.
set(sm80_architectures ${LLAVA_ST_CUDA_ARCHS})
list(FILTER sm80_architectures INCLUDE REGEX "^(8|12)[0-9]")
# wgmma, which only 9.0 has.
set(sm90_architectures ${LLAVA_ST_CUDA_ARCHS})
list(FILTER sm90_architectures INCLUDE REGEX "^90a(-real)?$")

set(LLAVA_ST_CUTLASS_DEFINITIONS "")
if(LLAVA_ST_CUTLASS_MISSING STREQUAL "")
  foreach(generation sm80 sm90)
    if(${generation}_architectures)
      file(GLOB sources CONFIGURE_DEPENDS csrc/cuda/linear_lape_gelu/cutlass/*_${generation}_*.cu)
      set(objects llava_st_cutlass_${generation})
      add_library(${objects} OBJECT ${sources})
      set_target_properties(${objects} PROPERTIES
        CUDA_ARCHITECTURES "${${generation}_architectures}" CUDA_VISIBILITY_PRESET hidden)
      target_include_directories(${objects} SYSTEM PRIVATE "${LLAVA_ST_CUTLASS_DIR}/include")
      target_compile_options(${objects} PRIVATE --expt-relaxed-constexpr)
      # Checks in device code would be calls, across which wgmma does not overlap.
      target_compile_definitions(${objects} PRIVATE NDEBUG)
      target_sources(llava_st_cuda PRIVATE $<TARGET_OBJECTS:${objects}>)
      string(TOUPPER "LLAVA_ST_CUTLASS_${generation}" definition)
      list(APPEND LLAVA_ST_CUTLASS_DEFINITIONS ${definition})
    endif()
  endforeach()
  if(NOT LLAVA_ST_CUTLASS_DEFINITIONS)
    set(LLAVA_ST_CUTLASS_MISSING "no architecture of ${LLAVA_ST_CUDA_ARCHS} has products by it")
    string(REPLACE ";" "," LLAVA_ST_CUTLASS_MISSING "${LLAVA_ST_CUTLASS_MISSING}")
  endif()
endif()

if(LLAVA_ST_CUTLASS_DEFINITIONS)
  message(STATUS "llava_st_ops: products by CUTLASS from ${LLAVA_ST_CUTLASS_DIR}")
  target_compile_definitions(llava_st_cuda PRIVATE ${LLAVA_ST_CUTLASS_DEFINITIONS})
else()
  message(STATUS "llava_st_ops: no products by CUTLASS: ${LLAVA_ST_CUTLASS_MISSING}")
endif()
