"""The two stages, their losses, and the one epoch loop.

batches        augmented batches with labels and targets
losses         pure loss functions of both stages
loss_weights   learned weights and gradient diagnosis
distill        stage 1: the student learns from the teacher
refine         stage 2: IGP-GCN learns on the student
left_right     training of the left-right swap resolver
pose_errors    a student's errors, measured and imitated
loop           the epoch loop and its recorder
evaluation     predict a split's crops and score them
networks       build, compile and measure networks
training_data  the stores of a study, opened
"""
