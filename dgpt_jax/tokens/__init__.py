"""Token stores: runs a teacher over images once, stores its tokens, verifies them.

build.py plans the shards and resumes, writer.py renders crops and runs the teacher (teacher.py),
verify.py runs it again on stored images.
"""
