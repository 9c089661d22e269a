# The CUDA extension. Its sources, for the emulation as well: kernels, the device layer, the ops' argument checks and
# what turns Python objects into arrays.
file(GLOB MXMOE_CUDA_KERNELS CONFIGURE_DEPENDS csrc/ops/*/*.cu)
file(GLOB MXMOE_CUDA_SOURCES CONFIGURE_DEPENDS csrc/cuda/*.cpp csrc/ops/*/*_check.cpp csrc/bindings/cuda_*.cpp)
list(APPEND MXMOE_CUDA_SOURCES ${PROJECT_SOURCE_DIR}/csrc/core/check.cpp ${PROJECT_SOURCE_DIR}/csrc/core/view.cpp
                               ${PROJECT_SOURCE_DIR}/csrc/bindings/tensor.cpp)

string(TOUPPER "${MXMOE_CUDA}" MXMOE_CUDA_WANTED)
if(NOT MXMOE_CUDA_WANTED MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "MXMOE_CUDA is ${MXMOE_CUDA}; wanted AUTO, ON or OFF")
endif()
if(MXMOE_CUDA_WANTED STREQUAL "OFF")
  return()
endif()
include(CheckLanguage)
# Real code for Ampere and its kin and for Hopper, with the instructions only it has; PTX for what comes later.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES "80-real;90a-real;80-virtual")
endif()
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(MXMOE_CUDA_WANTED STREQUAL "ON")
    message(FATAL_ERROR "MXMOE_CUDA is ON but no nvcc was found; wanted one on the PATH or in CMAKE_CUDA_COMPILER")
  endif()
  message(STATUS "No nvcc: built without CUDA")
  return()
endif()
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_EXTENSIONS OFF)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)  # nothing to find on the user's machine but the driver
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)

# No extras: nvcc knows no link-time optimisation.
pybind11_add_module(_cuda MODULE NO_EXTRAS ${MXMOE_CUDA_SOURCES} ${MXMOE_CUDA_KERNELS})
target_include_directories(_cuda PRIVATE csrc)
string(REPLACE ";" "," MXMOE_CUDA_ARCHITECTURE_NAMES "${CMAKE_CUDA_ARCHITECTURES}")
target_compile_definitions(_cuda PRIVATE MXMOE_CUDA_MODULE=_cuda
                                         "MXMOE_CUDA_ARCHITECTURES=\"${MXMOE_CUDA_ARCHITECTURE_NAMES}\"")
target_link_libraries(_cuda PRIVATE CUDA::cudart_static)
target_compile_options(_cuda PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra>
                                     $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall>)
if(MXMOE_WERROR)
  target_compile_options(_cuda PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Werror>
                                       $<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings>)
endif()
install(TARGETS _cuda LIBRARY DESTINATION mxmoe)
