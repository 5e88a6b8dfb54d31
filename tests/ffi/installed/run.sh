#!/usr/bin/env bash
# The tests of the C and C++ library, as make test-ffi runs them:
#   run.sh TRAINER LIBRARIES VERSION
# Everything is built against an installed tree that was moved, in a folder outside the repository. What a machine cannot
# do is named in a line that begins with `skipped:`.
set -euo pipefail
trainer=$(realpath "$1") libraries=$(realpath "$2") version=$3
repository=$(cd "$(dirname "$0")/../../.." && pwd)
libtorch=$(realpath -m "${LIBTORCH:-$repository/.libtorch}")
# Only absolute paths are of use outside the repository.
export LIBTORCH=$libtorch
cmake=$repository/.venv/bin/cmake
[ -x "$cmake" ] || cmake=$(command -v cmake) || { echo 'cmake is missing: make setup-ffi' >&2; exit 1; }
goldens=$repository/tests/goldens
checkpoint=$goldens/checkpoints/moe_vl

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

step() { printf -- '-- %s (%ss)\n' "$1" "$SECONDS"; }
skipped() { echo "skipped: $1"; }
has() { command -v "$1" >/dev/null; }
# Runs quietly; what it said is shown when it fails.
quietly() { "$@" >"$work/log" 2>&1 || { cat "$work/log"; echo "failed: $*" >&2; exit 1; }; }

# build SOURCE BUILD [CMAKE OPTION...]
build() {
  quietly "$cmake" -S "$1" -B "$2" -DCMAKE_PREFIX_PATH="$installed" "${@:3}"
  quietly "$cmake" --build "$2" -j2
}

step 'install, and move the tree'
quietly "$repository/bridge-ffi/install.sh" "$work/first" "$libraries" "$version"
mkdir "$work/moved"
mv "$work/first" "$work/moved/tree"
installed=$work/moved/tree
if grep -rIl -e "$work/first" -e "$repository" "$installed"; then
  echo 'these installed files know where they were made' >&2
  exit 1
fi

compilers=('gcc g++')
if has clang && has clang++; then
  compilers+=('clang clang++')
else
  skipped 'clang++ is not installed: headers, examples and tests compiled by it'
fi

for pair in "${compilers[@]}"; do
  read -r cc cxx <<<"$pair"
  step "$cxx: each public header alone, as C11, C++17 and C++20"
  for header in "$installed"/include/megatron_bridge/*; do
    name=megatron_bridge/$(basename "$header")
    flags=(-I"$installed/include" -pedantic -Wall -Wextra -Werror -fsyntax-only)
    case $name in
      *torch.hpp)
        [ -d "$libtorch/include" ] || { skipped "no libtorch: $name"; continue; }
        flags=(-I"$installed/include" -isystem "$libtorch/include" -Wall -Wextra -Werror -fsyntax-only) ;;
    esac
    for standard in c++17 c++20; do
      # The tests below compile it as C++17, and libtorch's headers take their time.
      [[ $name == *torch.hpp && $standard == c++17 ]] || echo "#include <$name>" | "$cxx" -std=$standard "${flags[@]}" -x c++ -
    done
    [[ $name == *.hpp ]] || echo "#include <$name>" | "$cc" -std=c11 "${flags[@]}" -x c -
  done

  step "$cxx: the example without libtorch, against both libraries"
  for shared in OFF ON; do
    build "$repository/examples/cpp/rank_loader" "rank_loader.$cxx.$shared" -DCMAKE_CXX_COMPILER="$cxx" \
      -DSHARED_LIBRARY=$shared
    for case in 'tp1 0' 'tp2 1 --tp 2' 'tp2_pp2_ep2_etp2 5 --tp 2 --pp 2 --ep 2 --etp 2'; do
      read -r layout rank options <<<"$case"
      rm -rf raw && mkdir raw
      # shellcheck disable=SC2086
      quietly "rank_loader.$cxx.$shared/rank_loader" "$checkpoint" "$rank" $options --raw raw
      python3 "$repository/tests/ffi/installed/goldens.py" compare moe_vl "$layout" "$rank" raw
    done
  done

  step "$cxx: under AddressSanitizer and UndefinedBehaviorSanitizer"
  sanitizers='-fsanitize=address,undefined -fno-sanitize-recover=all -O1 -g'
  build "$repository/tests/ffi/installed" "sanitized.$cxx" -DCMAKE_C_COMPILER="$cc" -DCMAKE_CXX_COMPILER="$cxx" \
    -DCMAKE_C_FLAGS="$sanitizers" -DCMAKE_CXX_FLAGS="$sanitizers"
  build "$repository/examples/cpp/rank_loader" "sanitized.rank_loader.$cxx" -DCMAKE_CXX_COMPILER="$cxx" \
    -DCMAKE_CXX_FLAGS="$sanitizers"
  quietly "sanitized.$cxx/abi_test" "$checkpoint"
  mkdir "out.$cxx"
  quietly "sanitized.$cxx/threads_test" "$checkpoint" "out.$cxx"
  quietly "$trainer" verify "$checkpoint" "out.$cxx/exported"
  quietly "sanitized.rank_loader.$cxx/rank_loader" "$checkpoint" 5 --tp 2 --pp 2 --ep 2 --etp 2
done

step 'g++ and pkg-config'
if has pkg-config; then
  export PKG_CONFIG_PATH=$installed/lib/pkgconfig
  # shellcheck disable=SC2046
  quietly g++ -std=c++17 "$repository/examples/cpp/rank_loader/main.cpp" $(pkg-config --cflags --libs megatron-bridge) \
    -Wl,-rpath,"$installed/lib" -o by_pkg_config
  quietly ./by_pkg_config "$checkpoint" 0
  [ "$(pkg-config --modversion megatron-bridge)" = "$version" ]
else
  skipped 'pkg-config is not installed: the .pc file'
fi

step "the README's program, from an empty directory"
mkdir readme
python3 - "$repository/README.md" readme <<'PYTHON'
import pathlib, re, sys
section = pathlib.Path(sys.argv[1]).read_text().split("## From C++\n")[1].split("\n## ")[0]
for block in re.findall(r"```\w+\n(.*?)```", section, re.DOTALL):
    named = re.match(r"(?://|#) (main.cpp|CMakeLists.txt)\n", block)
    if named:
        pathlib.Path(sys.argv[2], named[1]).write_text(block)
PYTHON
build readme readme/build
[ "$(readme/build/job "$checkpoint" 1 | cut -d' ' -f2)" = tensors, ]

build "$repository/tests/ffi/installed" plain
step 'concurrent loads under a race detector'
# ThreadSanitizer must see the whole of Rust's standard library, so it needs its source, and the runtime that comes with it.
nightly=$(rustc +nightly --print sysroot 2>/dev/null || true)
if [ -d "$nightly/lib/rustlib/src/rust/library" ] && has clang++; then
  target=x86_64-unknown-linux-gnu
  (cd "$repository" && quietly env CXX=clang++ CXXFLAGS=-fsanitize=thread RUSTFLAGS=-Zsanitizer=thread cargo +nightly build \
    --release -p bridge-ffi -Zbuild-std --target $target --target-dir target/ffi-tsan)
  mkdir tsan.libraries out.tsan
  cp -P "$libraries"/libmegatron_bridge.so* tsan.libraries
  cp "$repository/target/ffi-tsan/$target/release/libbridge_ffi.a" tsan.libraries/libmegatron_bridge.a
  quietly "$repository/bridge-ffi/install.sh" "$work/tsan.installed" tsan.libraries "$version"
  # Instrumented by clang, linked with the runtime of rustc: that of an older clang lacks functions.
  instrumented='-Xclang -fsanitize=thread -O1 -g'
  installed=$work/tsan.installed build "$repository/tests/ffi/installed" tsan -DCMAKE_C_COMPILER=clang \
    -DCMAKE_CXX_COMPILER=clang++ -DCMAKE_C_FLAGS="$instrumented" -DCMAKE_CXX_FLAGS="$instrumented" \
    -DCMAKE_EXE_LINKER_FLAGS="-Wl,--whole-archive $nightly/lib/rustlib/$target/lib/librustc-nightly_rt.tsan.a -Wl,--no-whole-archive -Wl,--export-dynamic -lrt -lresolv -lpthread -ldl -lm"
  quietly env TSAN_OPTIONS=halt_on_error=1 tsan/threads_test "$checkpoint" out.tsan
elif has valgrind; then
  mkdir out.helgrind
  # Whole stacks, for the suppressions to find the library in them.
  quietly valgrind --tool=helgrind --error-exitcode=9 --num-callers=100 --suppressions="$repository/tests/ffi/installed/helgrind.supp" \
    plain/threads_test "$checkpoint" out.helgrind
else
  skipped 'valgrind is not installed, and no Rust toolchain has rust-src: concurrent loads under helgrind or ThreadSanitizer'
fi

step 'memory under valgrind'
if has valgrind; then
  memcheck=(valgrind --error-exitcode=9 --leak-check=full --errors-for-leak-kinds=definite,indirect,possible
    --suppressions="$repository/tests/ffi/installed/memcheck.supp")
  quietly "${memcheck[@]}" plain/abi_test "$checkpoint"
  quietly "${memcheck[@]}" rank_loader.g++.OFF/rank_loader "$checkpoint" 5 --tp 2 --pp 2 --ep 2 --etp 2
else
  skipped 'valgrind is not installed: the example under valgrind'
fi

if [ -d "$libtorch/include" ]; then
  step 'torch.hpp, and the operator library'
  build "$installed/share/megatron_bridge/torch_ops" torch_ops
  build "$repository/tests/ffi/installed" torch -DWITH_TORCH=ON
  mkdir out.torch
  quietly torch/torch_test "$checkpoint" out.torch
  quietly "$trainer" verify "$checkpoint" out.torch/exported
  quietly torch/torch_ops_test torch_ops/libmegatron_bridge_torch.so "$checkpoint"

  step 'a job of eight processes'
  build "$repository/examples/cpp/megatron_job" megatron_job
  mkdir expected
  python3 "$repository/tests/ffi/installed/goldens.py" list moe_vl tp2_pp2_ep2_etp2 expected
  job=("$repository/examples/cpp/megatron_job/launch.sh" 8 megatron_job/megatron_job --tp 2 --pp 2 --ep 2 --etp 2)
  quietly env OMP_NUM_THREADS=1 "${job[@]}" --model "$checkpoint" --expect expected --factor 2 --export doubled --export-id one
  if "$trainer" verify "$checkpoint" doubled >log 2>&1; then
    echo 'the step changed nothing' >&2
    exit 1
  fi
  quietly env OMP_NUM_THREADS=1 "${job[@]}" --model doubled --factor 0.5 --export halved --export-id two
  quietly "$trainer" verify "$checkpoint" halved
else
  skipped "no libtorch in $libtorch: torch.hpp, the operator library, the job of eight processes"
fi
step 'done'
