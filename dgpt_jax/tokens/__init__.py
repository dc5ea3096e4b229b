"""Token stores: runs a teacher over images once, stores its tokens, verifies them.

build.py stores crops (views.py) with the tokens of a teacher (teacher.py), further.py adds another
teacher from the stored crops; both write what is missing of a plan of shards (shard_plan.py,
writer.py). verify.py runs a teacher again on stored images.
"""
