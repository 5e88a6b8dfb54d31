#!/usr/bin/env bash
# Installs headers, libraries, the CMake package and the pkg-config file below a prefix; make install calls it:
#   install.sh PREFIX LIBRARIES VERSION        (LIBRARIES: what link.sh made)
# Nothing installed knows the prefix: the tree may be moved.
set -euo pipefail
prefix=$1 libraries=$2 version=$3
room=$(cd "$(dirname "$0")" && pwd)

case $prefix in
  /*) ;;
  *) echo "PREFIX is $prefix, but must be an absolute path" >&2; exit 2 ;;
esac

soname=$(readlink "$libraries/libmegatron_bridge.so")

filled() { sed -e "s/@VERSION@/$version/" -e "s/@SONAME@/$soname/" "$1"; }

mkdir -p "$prefix"/{include/megatron_bridge,lib/cmake/MegatronBridge,lib/pkgconfig,share/megatron_bridge/torch_ops}
install -m 644 "$room"/include/megatron_bridge/* "$prefix/include/megatron_bridge/"
install -m 644 "$libraries/libmegatron_bridge.a" "$prefix/lib/"
install -m 755 "$libraries/$soname" "$prefix/lib/libmegatron_bridge.so.$version"
ln -sfn "libmegatron_bridge.so.$version" "$prefix/lib/$soname"
ln -sfn "$soname" "$prefix/lib/libmegatron_bridge.so"
for file in MegatronBridgeConfig.cmake MegatronBridgeConfigVersion.cmake MegatronBridgeTorch.cmake; do
  filled "$room/cmake/$file" >"$prefix/lib/cmake/MegatronBridge/$file"
done
filled "$room/cmake/megatron-bridge.pc" >"$prefix/lib/pkgconfig/megatron-bridge.pc"
install -m 644 "$room"/torch_ops/* "$prefix/share/megatron_bridge/torch_ops/"
echo "installed in $prefix: give CMake -DCMAKE_PREFIX_PATH=$prefix, or pkg-config PKG_CONFIG_PATH=$prefix/lib/pkgconfig"
