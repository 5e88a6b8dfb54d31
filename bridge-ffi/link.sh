#!/usr/bin/env bash
# Makes libmegatron_bridge.so and libmegatron_bridge.a out of the crate, and checks what they show and how large they are.
#
#   bridge-ffi/link.sh [DIRECTORY]        (default: target/ffi)
#
# The static library is one object in which everything but the interface is local, so that a program may hold other Rust
# libraries too. A program that links it needs -lstdc++ (a C++ compiler adds it), -lpthread, -ldl and -lm.
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:-target/ffi}" && cd "${1:-target/ffi}" && pwd)
limit=$((8 << 20))

cargo build --release -p bridge-ffi
archive=${CARGO_TARGET_DIR:-target}/release/libbridge_ffi.a
version=$(sed -n '/^\[workspace.package\]/,/^\[/s/^version = "\(.*\)"/\1/p' Cargo.toml)
soname=libmegatron_bridge.so.${version%%.*}
map=bridge-ffi/exports.map

# The interface's symbols, by which the linker knows what to keep.
is_public='^(bridge_[a-z_]+|_ZNK?15megatron_bridge(7version|10size_bytes|9to_string|5Error|12Cancellation|8Provider|10Checkpoint|4Plan|8Exporter).*|_ZT[ISV]N15megatron_bridge5ErrorE)$'
nm --defined-only --extern-only "$archive" 2>/dev/null | awk 'NF == 3 { print $3 }' | sort -u |
  grep -E "$is_public" | grep -vE '4Impl|9Internals' >"$out/symbols.txt"

# ---- Shared
g++ -shared -o "$out/$soname" -Wl,-soname,"$soname" -Wl,--version-script,$map -Wl,--gc-sections \
  -Wl,--no-undefined -Wl,-z,relro,-z,now -Wl,--whole-archive "$archive" -Wl,--no-whole-archive \
  -lpthread -ldl -lm
strip --strip-unneeded "$out/$soname"
ln -sfn "$soname" "$out/libmegatron_bridge.so"

# ---- Static
# Without groups: the program's own copy of an inline function must not take the place of one that is local here.
ld -r --gc-sections --force-group-allocation $(sed 's/^/-u /' "$out/symbols.txt") -o "$out/megatron_bridge.o" "$archive"
# The standard library carries bitcode beside its code, which is of no use here, and which some archivers stumble over.
objcopy --keep-global-symbols="$out/symbols.txt" --strip-debug --remove-section=.llvmbc --remove-section=.llvmcmd \
  "$out/megatron_bridge.o"
rm -f "$out/libmegatron_bridge.a"
ar rcs "$out/libmegatron_bridge.a" "$out/megatron_bridge.o"
rm "$out/megatron_bridge.o"

# ---- Checks
fail() { echo "$1" >&2; exit 1; }
shown=$(nm -D --defined-only "$out/$soname" | awk '{ print $3 }' | sort -u)
extra=$(grep -vE "$is_public" <<<"$shown" || true)
[ -z "$extra" ] || fail "$soname shows more than the interface: $(head -5 <<<"$extra")"
for name in $(grep -oE '\bbridge_[a-z_]+\(' bridge-ffi/include/megatron_bridge/megatron_bridge.h | tr -d '(' | sort -u); do
  grep -qx "$name" <<<"$shown" || fail "$soname lacks $name of the header"
done
extra=$(nm --defined-only --extern-only "$out/libmegatron_bridge.a" | awk 'NF == 3 { print $3 }' | grep -vE "$is_public" || true)
[ -z "$extra" ] || fail "libmegatron_bridge.a shows more than the interface: $(head -5 <<<"$extra")"
size=$(stat -Lc %s "$out/libmegatron_bridge.so")
[ "$size" -lt "$limit" ] || fail "$soname has $size bytes, more than $limit"
echo "$out: $soname ($((size >> 10)) KiB, $(wc -l <<<"$shown") symbols), libmegatron_bridge.a ($(($(stat -c %s "$out/libmegatron_bridge.a") >> 10)) KiB)"
