"""What the peers' scripts share: the program under test, and one line a check."""
import argparse, json, pathlib, subprocess, sys

GOLDENS = pathlib.Path(__file__).resolve().parents[1] / "goldens"


class Checks:
    """Runs `trainer`, counts what fails."""

    def __init__(self):
        parser = argparse.ArgumentParser()
        parser.add_argument("--trainer", type=pathlib.Path, required=True)
        self.trainer = parser.parse_args().trainer.resolve()
        self.failed = []

    def check(self, what, good, detail=""):
        print(f"{'ok    ' if good else 'FAILED'} {what}{'' if good else ': ' + str(detail)}", flush=True)
        if not good:
            self.failed.append(what)

    def run(self, *command):
        """Standard output and standard error; whatever else was to be checked makes no sense after a failure."""
        done = subprocess.run([str(self.trainer), *map(str, command)], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"trainer {' '.join(map(str, command))}\n{done.stderr[-3000:]}")
        return done.stdout, done.stderr

    def finish(self):
        print(json.dumps({"failed": self.failed}))
        sys.exit(1 if self.failed else 0)
