from runtime.loopback import confine_ray

confine_ray()  # before any module below imports Ray
