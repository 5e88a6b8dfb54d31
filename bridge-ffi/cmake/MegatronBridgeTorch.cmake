# MegatronBridge::torch: what megatron_bridge/torch.hpp needs of libtorch.
#
# A libtorch found by find_package(Torch) is taken as it is. Its own package wants a whole CUDA toolkit wherever it was
# built with CUDA, also for a job that runs on the CPU; so headers and libraries are enough here: -DLIBTORCH=DIR, where
# DIR is an unpacked libtorch or the `torch` folder of a Python installation.
if(NOT TARGET MegatronBridge::torch)
  if(TARGET torch)
    add_library(MegatronBridge::torch INTERFACE IMPORTED)
    set_target_properties(MegatronBridge::torch PROPERTIES INTERFACE_LINK_LIBRARIES "${TORCH_LIBRARIES}")
  else()
    set(LIBTORCH "$ENV{LIBTORCH}" CACHE PATH "libtorch, or the torch folder of a Python installation")
    # Links would hide where its libraries look for those of CUDA.
    get_filename_component(_megatron_bridge_torch "${LIBTORCH}" REALPATH)
    if(LIBTORCH AND EXISTS "${_megatron_bridge_torch}/include/ATen/core/Tensor.h"
        AND EXISTS "${_megatron_bridge_torch}/lib/libtorch_cpu.so")
      add_library(MegatronBridge::torch INTERFACE IMPORTED)
      # System headers: a job's warnings are about the job.
      set_target_properties(MegatronBridge::torch PROPERTIES
        INTERFACE_SYSTEM_INCLUDE_DIRECTORIES
          "${_megatron_bridge_torch}/include;${_megatron_bridge_torch}/include/torch/csrc/api/include"
        INTERFACE_INCLUDE_DIRECTORIES
          "${_megatron_bridge_torch}/include;${_megatron_bridge_torch}/include/torch/csrc/api/include"
        INTERFACE_LINK_LIBRARIES "${_megatron_bridge_torch}/lib/libc10.so;${_megatron_bridge_torch}/lib/libtorch_cpu.so")
    else()
      set(MegatronBridge_FOUND FALSE)
      set(MegatronBridge_NOT_FOUND_MESSAGE
        "the component `torch` needs libtorch: call find_package(Torch) before, or give -DLIBTORCH=DIR, the folder that holds include/ATen and lib/libtorch_cpu.so (found `${LIBTORCH}`)")
    endif()
    unset(_megatron_bridge_torch)
  endif()
endif()
set(MegatronBridge_torch_FOUND "${MegatronBridge_FOUND}")
if(TARGET MegatronBridge::torch)
  set(MegatronBridge_torch_FOUND TRUE)
endif()
