"""Commands: train, evaluate, sft, world, doctor; their parts in run/, record/, report/."""

from runtime.loopback import confine_ray

confine_ray()  # before any module below imports Ray
