"""Pure tensor functions shared by the methods: they know no model, no host and no method.

Modules
-------
allocate : how many tokens each frame may keep.
attention : attention statistics (received, class token, last query) without the full attention matrix.
centre : channel variances and closeness to the centres of a video and its frames.
cluster : density-peak clustering.
diversity : farthest-point selection.
grid : neighbours and rows of the patch grid.
merge : sparse merge maps and the averages they stand for.
segment : cutting a video into static segments.
select : deterministic top-k.
similarity : unit vectors, cosines, kernels.

Every function accepts any floating dtype on any device, computes in float32 (float64 stays float64) and
breaks ties in favour of the lowest index, so that a selection is the same on every machine.
"""
