"""Generated driving scenes in the nuScenes v1.0 schema.

rig        the sensors and where they are mounted
catalogue  the meshes and sizes of the ten detection classes
world      a street: the objects on it and their places at a given time
cast       ray casting with Embree
shade      light, weather and textures: rays' hits to an image
generate   the loop over scenes, sensors and keyframes; `qat.data.tables` writes the tables
"""

from qat.data.synth.generate import SynthOptions, generate

__all__ = ["SynthOptions", "generate"]
