"""The other systems by name, as programs of the one loop."""

from flax_skd.rivals import matvit, scala
from flax_skd.run import training

PROGRAMS: training.Programs = {
    "matvit": matvit.program,
    "scala": scala.program,
}
