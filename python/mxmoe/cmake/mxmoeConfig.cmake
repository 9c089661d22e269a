# find_package(mxmoe CONFIG) gives mxmoe::mxmoe, the library behind mxmoe.h. All paths are relative to this file.
# Its folder is what mxmoe.get_cmake_dir() says: cmake -Dmxmoe_DIR="$(python -c 'import mxmoe; print(mxmoe.get_cmake_dir())')"
get_filename_component(_mxmoe_root "${CMAKE_CURRENT_LIST_DIR}/.." ABSOLUTE)
if(WIN32)
  set(_mxmoe_library "${_mxmoe_root}/lib/mxmoe.dll")
elseif(APPLE)
  set(_mxmoe_library "${_mxmoe_root}/lib/libmxmoe.dylib")
else()
  set(_mxmoe_library "${_mxmoe_root}/lib/libmxmoe.so")
endif()

if(NOT EXISTS "${_mxmoe_library}")
  set(mxmoe_FOUND FALSE)
  set(mxmoe_NOT_FOUND_MESSAGE "${_mxmoe_library} is missing: this is no complete installation of mxmoe.")
elseif(NOT TARGET mxmoe::mxmoe)
  add_library(mxmoe::mxmoe SHARED IMPORTED)
  set_target_properties(mxmoe::mxmoe PROPERTIES
    IMPORTED_LOCATION "${_mxmoe_library}"
    INTERFACE_INCLUDE_DIRECTORIES "${_mxmoe_root}/include")
  if(WIN32)
    set_target_properties(mxmoe::mxmoe PROPERTIES IMPORTED_IMPLIB "${_mxmoe_root}/lib/mxmoe.lib")
  elseif(APPLE)
    set_target_properties(mxmoe::mxmoe PROPERTIES IMPORTED_SONAME "@rpath/libmxmoe.dylib")
  else()
    set_target_properties(mxmoe::mxmoe PROPERTIES IMPORTED_SONAME "libmxmoe.so")
  endif()
endif()
unset(_mxmoe_library)
unset(_mxmoe_root)
