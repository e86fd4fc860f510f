"""Segmentation: every object that the question means, by box and point; SAM2 draws the masks."""

from perception.tasks import task
from perception.tasks.objects import ObjectList


@task("segment")
class Segment(ObjectList):
    metrics = ("mask_iou",)
