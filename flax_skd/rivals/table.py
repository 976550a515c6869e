"""The other systems by name, as programs of the one loop."""

from flax_skd.rivals import ldr, matvit, scala
from flax_skd.run import training

PROGRAMS: training.Programs = {
    "ldr": ldr.program,
    "matvit": matvit.program,
    "scala": scala.program,
}
