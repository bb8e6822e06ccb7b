"""Search spaces: what a study may vary, as YAML files, and the module that reads them.

distill.yaml  the losses of stage 1
joint.yaml    both stages in one search
poses.yaml    both stages, for teachers without features
refine.yaml   IGP-GCN's shape and training
smoke.yaml    three parameters for a quick run
space         reads, checks and samples a space
staged.yaml   stage 1 first, then stage 2
"""
