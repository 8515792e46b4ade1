"""Linear classification of frozen features, with all labels and with few."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gatedkernels.training.evaluation.features import Features
from gatedkernels.training.seeds import derived_seed

EPOCHS = 100
_LR = 0.3
_MILESTONES = (60, 80)
_BATCH_SIZE = 512
_STEADY_EPSILON = 1e-6


def linear_accuracy(
    train: Features,
    test: Features,
    *,
    seed: int = 0,
    epochs: int | None = None,
    epoch_features: Callable[[int], Tensor] | None = None,
) -> float:
    """Train a linear classifier on frozen features and return its test accuracy after the last epoch.

    SGD with momentum 0.9, no weight decay, learning rate 0.3, a tenth of it after 60 % and again after 80 % of 100
    epochs, batches of 512: the protocol of Krishna et al., BMVC 2023.

    Args:
        train: Features of the training images.
        test: Features of the test images.
        seed: Decides the initial weights and the order of the images.
        epochs: Length of the training; None: 100.
        epoch_features: Returns the features of the training images for an epoch, newly augmented, as the protocol has
            it; None: ``train`` in every epoch, which costs one pass through the backbone instead of a hundred.

    Returns:
        The share of test images classified correctly.
    """
    epochs = epochs or EPOCHS
    num_classes = int(train.labels.max()) + 1
    generator = torch.Generator().manual_seed(derived_seed("linear", seed))
    classifier = nn.Linear(train.values.shape[1], num_classes)
    with torch.no_grad():
        bound = train.values.shape[1] ** -0.5
        for parameter in classifier.parameters():
            parameter.uniform_(-bound, bound, generator=generator)
    optimizer = torch.optim.SGD(classifier.parameters(), _LR, momentum=0.9)
    milestones = [round(milestone * epochs / EPOCHS) for milestone in _MILESTONES]
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = _LR * 0.1 ** sum(epoch >= milestone for milestone in milestones)
        values = train.values if epoch_features is None else epoch_features(epoch)
        for chosen in torch.randperm(len(values), generator=generator).split(_BATCH_SIZE):
            loss = F.cross_entropy(classifier(values[chosen]), train.labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        predicted = classifier(test.values).argmax(dim=1)
    return float((predicted == test.labels).double().mean())


def few_label_accuracy(train: Features, test: Features, *, labels: int = 5, draws: int = 20, seed: int = 0) -> float:
    """Fit a logistic regression to a few labelled images of each class; mean test accuracy over several draws.

    Features are standardised with the statistics of all training images, which need no labels, so that one strength of
    the L2 penalty (scikit-learn's default, C = 1) suits representations of any scale.

    Args:
        train: Features of the training images.
        test: Features of the test images.
        labels: Labelled images of each class.
        draws: How often they are drawn anew.
        seed: Decides the draws, the same for every representation.

    Returns:
        The mean accuracy.

    Raises:
        ValueError: If a class has fewer training images than ``labels``.
    """
    from sklearn.linear_model import LogisticRegression

    smallest = int(train.labels.bincount().min())
    if smallest < labels:
        raise ValueError(f"labels must be at most the {smallest} training images of the smallest class, got {labels}")
    mean, std = train.values.mean(dim=0), train.values.std(dim=0) + _STEADY_EPSILON
    train_values, test_values = ((part.values - mean) / std for part in (train, test))
    accuracies = []
    for draw in range(draws):
        generator = torch.Generator().manual_seed(derived_seed("few labels", seed, draw))
        order = torch.randperm(len(train.labels), generator=generator)
        members = [order[train.labels[order] == label][:labels] for label in train.labels.unique()]
        chosen = torch.cat(members)
        classifier = LogisticRegression(max_iter=1000).fit(train_values[chosen].numpy(), train.labels[chosen].numpy())
        accuracies.append(float(classifier.score(test_values.numpy(), test.labels.numpy())))
    return sum(accuracies) / draws
