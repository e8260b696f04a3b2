"""phi, PPO's value function: the paper's, and not used by General Points' default."""

import torch


class ValueFunction(torch.nn.Module):
    """The policy's last hidden state (..., D) -> a token's value (...)."""

    def __init__(self, width, lr):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.Tanh(), torch.nn.Linear(width, 1))
        self.optimizer = torch.optim.Adam(self.parameters(), lr=lr)

    def forward(self, states):
        return self.layers(states).squeeze(-1)

    def learn(self, values, returns, mask):
        """A step on the squared error of values (B, T), which hold their graph, on the mask."""
        self.optimizer.zero_grad()
        (0.5 * ((values - returns) ** 2).sum() / mask.sum()).backward()
        self.optimizer.step()


def value_function(model, lr=1e-3):
    """phi of a policy, on its device."""
    weight = model.get_input_embeddings().weight
    return ValueFunction(weight.shape[1], lr).to(weight.device)
