"""Run a study: ``python study/tune.py``, or with settings, ``data=coco data.root=/data/coco``."""

import os
import sys

HERE = os.path.dirname(os.path.realpath(__file__))
if os.path.isfile(os.path.join(HERE, "__init__.py")):
    # In a checkout: its root on the path in place of study/, whose file names would shadow others.
    sys.path[0] = os.path.dirname(HERE)

import argparse

EPILOG = """\
settings are written key=value, for example:
  python study/tune.py                                    people that the study draws itself
  python study/tune.py data=coco data.root=/data/coco     COCO by its official file names
  python study/tune.py search_space=distill search.trials=40 trial.gpus=1
data: drawn | coco | crowdpose, for labs coco_full | crowdpose_full (see their YAML in study/conf).
search_space: distill | refine | joint | poses | smoke | your YAML; of plan=staged, staged.
The same command again goes on with a study that was broken off.
--cfg lists every setting with its value; study/config/schema.py says what each one means.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Search for the settings that distill a light pose estimator best.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument("--cfg", action="store_true", help="print the settings and stop")
    arguments = parser.parse_args()

    from study.config.compose import compose, to_plain
    from study.errors import InputError

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
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on where this one stopped")


if __name__ == "__main__":
    main()
