"""Metrics of each epoch of a run."""

EpochMetrics = dict[str, float]
"""Metrics of one epoch by name: a row of a run's history, as checkpoints store it in JSON.

Shares and accuracies are in [0, 1]. NAME is the name of an attack or of a term of the method.

Every epoch has:
    epoch: Number of the epoch, from 1.
    train/lr: Learning rate.
    train/loss: Mean training loss.
    train/clean: Accuracy on natural training images, if the method uses them.
    train/NAME: Accuracy on training images under an attack.
    train/kappa_NAME, train/kappa_median_NAME: Mean and median kappa of an attack that counts it.
    train/V_NAME: Mean V under an attack, small if the model is vulnerable (LRAT, equations 8, 9).
    train/weight_NAME: Mean instance weight of a term before normalisation.
    train/ess_NAME: Effective sample size of a term's weights, as a share of the examples.
    train/active_NAME: Share of examples with a positive weight.
    train/low_weight_NAME: Share of examples whose weight is below 0.2 of the batch's mean.
    train/seconds: Training time in seconds, without validation.

A validated epoch (see `validation.every`) also has:
    clean: Accuracy on natural validation images.
    NAME: Accuracy under an attack of `validation.attacks`.
    robust_worst: Share of examples that survive all validation attacks.
    robust_margin: Margin of an example under the worst attack divided by its margin without an
        attack, averaged over the examples, in [0, 1]; 0 for an example that does not survive.
        Breaks ties of `robust_worst`.
    masking_gap: Accuracy under the first attack minus `robust_worst`.
    zero_gradient: Share of examples that are correct and whose cross-entropy has zero gradient.
    val/chance_limit: Natural accuracy up to which the model may be guessing.
    val/ce_cw_gap, val/scaling_gap: Symptoms of masked gradients (see `Validation`).
    flatness_friendly, flatness_adversarial: Norms of the input gradient, if `validation.flatness`.
    train/natural: Accuracy on 1,000 natural training images, in eval mode: the first ones, or
        equally many of each class if the first ones lack one.
    train/robust: Accuracy on training images under PGD-20, in eval mode, if
        `validation.train_examples` asks for it.
    validation_seconds: Validation time in seconds.

An epoch that was reused from another run also has:
    shared: 1.0.
"""
