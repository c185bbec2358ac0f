"""Local smoothness beside the gradient norm: measured in any training loop, fitted, plotted, used to clip.

Units, with [f] the loss and [x] the parameters: gradient norm [f/x], smoothness and L0 [f/x^2], L1 [1/x],
learning rate [x^2/f], threshold [f/x], step cap [x].
"""
