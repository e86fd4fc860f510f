"""Write the synthetic world to disk as a COCO-format data set with referring expressions.

    python -m launch.world [out=data/world] [train=4096] [eval=256] [side=224] [seed=0]

`train.json` and `eval.json` are scenes of one kind, `shifted.json` holds harder ones (`synthetic.scenes.SHIFTED`), all
from different seeds. The same arguments write the same bytes.
"""

from launch.run.command_line import command
from synthetic.world import World

if __name__ == "__main__":
    command(World, World.write)
