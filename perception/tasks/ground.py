"""Grounding: a box for every object that the question means."""

from typing import ClassVar

from perception.tasks import task
from perception.tasks.objects import ObjectList


@task("ground")
class Ground(ObjectList):
    needs: ClassVar = (("box",),)
    metrics = ("box_accuracy", "box_iou")
