"""Run a study: ``python study/tune.py`` and settings such as ``data=coco data.root=/data``."""

import os
import sys

HERE = os.path.dirname(os.path.realpath(__file__))
if os.path.isfile(os.path.join(HERE, "__init__.py")):
    # In a checkout, put its root on the path instead of study/, whose modules would shadow others.
    sys.path[0] = os.path.dirname(HERE)

import argparse

EPILOG = """\
settings are written key=value, for example:
  python study/tune.py                                    synthetic people
  python study/tune.py data=coco data.root=/data/coco     COCO under its official file names
  python study/tune.py search_space=distill search.trials=40 trial.gpus=1
data: drawn | coco | crowdpose; coco_full | crowdpose_full at full scale (study/config/data).
search_space: distill | refine | joint | poses | smoke | a YAML file; with plan=staged: staged.
Run the same command again to resume an interrupted study.
--cfg prints every setting and its value; study/config/schema.py documents them.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Search for the best settings to distill a light pose estimator.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument("--cfg", action="store_true", help="print the settings and stop")
    arguments = parser.parse_args()

    from study.interrupts import AGAIN, ends_in_one_line

    with ends_in_one_line(f"{AGAIN} to resume"):
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Run the study, or print its settings."""
    from study.config.compose import compose, to_plain
    from study.display import escape_unprintable
    from study.errors import InputError

    escape_unprintable()
    try:
        config = compose(arguments.settings)
        if arguments.cfg:
            from omegaconf import OmegaConf

            print(OmegaConf.to_yaml(to_plain(config)), end="")
            return
        from study.driver import run_study

        run_study(config)
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
