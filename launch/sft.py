"""Train the models the demo starts from, from random weights, on the synthetic world.

    python -m launch.sft                    # the policy: assets/policy
    python -m launch.sft target=tool        # the SAM2 model: assets/segmenter

`steps`, `batch`, `lr`, `seed` and `threads` may be given; their defaults are those of the shipped models.
"""

from launch.run.command_line import command
from synthetic.sft import WarmStartSettings, sft

if __name__ == "__main__":
    command(WarmStartSettings, sft)
