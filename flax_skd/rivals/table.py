"""The other systems by name, as programs of the one loop."""

from flax_skd.rivals import hpm_kd, ldr, matvit, scala, uvc
from flax_skd.run import training

PROGRAMS: training.Programs = {
    "hpm_kd": hpm_kd.program,
    "ldr": ldr.program,
    "matvit": matvit.program,
    "scala": scala.program,
    "uvc": uvc.program,
}
