#!/usr/bin/env bash
# Starts N processes of a command with RANK and WORLD_SIZE set, as torchrun --no-python does:
#   launch.sh N COMMAND...
# Ends with the first status that is not 0; whatever still runs then is ended.
set -euo pipefail
world=$1
shift
for ((rank = 0; rank < world; rank++)); do
  RANK=$rank LOCAL_RANK=$rank WORLD_SIZE=$world "$@" &
done
status=0
for ((rank = 0; rank < world; rank++)); do
  wait -n || { status=$?; break; }
done
((status == 0)) || kill $(jobs -p) 2>/dev/null || true
wait || true
exit "$status"
