# The library of the bridge between Hugging Face checkpoints and Megatron-Core, for C and C++.
#
#   find_package(MegatronBridge CONFIG REQUIRED)
#   target_link_libraries(job PRIVATE MegatronBridge::static)      # or MegatronBridge::shared
#
#   find_package(MegatronBridge CONFIG REQUIRED COMPONENTS torch)
#   target_link_libraries(job PRIVATE MegatronBridge::static MegatronBridge::torch)
#
# The component `torch` is for users of megatron_bridge/torch.hpp: MegatronBridge::torch is the libtorch that a
# find_package(Torch) before found, or else the one in the CMake or environment variable LIBTORCH.
#
# Every path is relative to this file, so that the whole tree may be moved.
get_filename_component(_megatron_bridge_prefix "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)

if(NOT TARGET MegatronBridge::static)
  find_package(Threads REQUIRED)
  add_library(MegatronBridge::static STATIC IMPORTED)
  set_target_properties(MegatronBridge::static PROPERTIES
    IMPORTED_LOCATION "${_megatron_bridge_prefix}/lib/libmegatron_bridge.a"
    INTERFACE_INCLUDE_DIRECTORIES "${_megatron_bridge_prefix}/include"
    INTERFACE_LINK_LIBRARIES "stdc++;Threads::Threads;${CMAKE_DL_LIBS};m")
  add_library(MegatronBridge::shared SHARED IMPORTED)
  set_target_properties(MegatronBridge::shared PROPERTIES
    IMPORTED_LOCATION "${_megatron_bridge_prefix}/lib/libmegatron_bridge.so"
    IMPORTED_SONAME "@SONAME@"
    INTERFACE_INCLUDE_DIRECTORIES "${_megatron_bridge_prefix}/include")
endif()

foreach(_megatron_bridge_component IN LISTS MegatronBridge_FIND_COMPONENTS)
  if(_megatron_bridge_component STREQUAL "torch")
    include("${CMAKE_CURRENT_LIST_DIR}/MegatronBridgeTorch.cmake")
  elseif(MegatronBridge_FIND_REQUIRED_${_megatron_bridge_component})
    set(MegatronBridge_FOUND FALSE)
    set(MegatronBridge_NOT_FOUND_MESSAGE
      "there is no component `${_megatron_bridge_component}`; the only one is `torch`")
  endif()
endforeach()
unset(_megatron_bridge_component)
unset(_megatron_bridge_prefix)
