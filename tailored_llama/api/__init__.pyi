# The face of the room: what other rooms may import. Each name is loaded when it is first used.
from .calls import compare as compare
from .calls import prune as prune
from .calls import smallest as smallest
from .calls import tune as tune
from .models import Small as Small
from .models import Smallest as Smallest
