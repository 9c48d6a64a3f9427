from unmask.generation.complete import *  # noqa
from unmask.generation.complete import Completion, complete  # noqa
