"""What the peers' scripts share: the program under test, and one line a check."""
import argparse, json, pathlib, subprocess, sys

GOLDENS = pathlib.Path(__file__).resolve().parents[1] / "goldens"


class Checks:
    """Runs `trainer`, counts what fails. Each path of the command line is an attribute."""

    def __init__(self, *more_paths):
        parser = argparse.ArgumentParser()
        for name in ("trainer", *more_paths):
            parser.add_argument(f"--{name}", type=pathlib.Path, required=True)
        for name, path in vars(parser.parse_args()).items():
            setattr(self, name, path.resolve())
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
