// Causal convolution and silu against float64, and the chunk map that it walks by: packs with empty sequences, sequences
// shorter than the taps, tails, states, slices.

#include "../conv1d_silu.cu"

#include "check.hpp"
#include "goldens.hpp"
#include "packs.hpp"

using namespace check;

namespace {

struct Case {
  Pack pack;
  int channels, gap;  // gap: elements between tokens that belong to something else
  Values x, w, state, g;  // x, g: [tokens, channels + gap]; state: [sequences, channels, 3] or empty

  size_t pitch() const { return static_cast<size_t>(channels + gap); }
};

struct Reference {
  Values out, d_x, d_w, d_state;  // out, d_x as x; NaN in the gaps
};

Reference reference(const Case& c) {
  const auto channels = static_cast<size_t>(c.channels);
  const size_t n = static_cast<size_t>(c.pack.tokens()) * c.pitch();
  Reference ref{Values(n, std::nan("")), Values(n, std::nan("")), Values(channels * 4),
                Values(static_cast<size_t>(c.pack.sequences()) * channels * 3)};
  const Values borders = c.pack.borders();
  for (size_t channel = 0; channel < channels; ++channel) {
    for (int64_t t = 0; t < c.pack.tokens(); ++t) {  // what no sequence holds
      ref.out[static_cast<size_t>(t) * c.pitch() + channel] = ref.d_x[static_cast<size_t>(t) * c.pitch() + channel] = 0.0;
    }
    const double* w = c.w.data() + channel * 4;
    for (size_t s = 0; s < c.pack.lengths.size(); ++s) {
      const auto length = static_cast<size_t>(c.pack.lengths[s]);
      const auto first = static_cast<size_t>(borders[s]);
      Values x(length + 3), d_x(length + 3);
      for (size_t i = 0; i < 3; ++i) {
        x[i] = c.state.empty() ? 0.0 : c.state[(s * channels + channel) * 3 + i];
      }
      for (size_t t = 0; t < length; ++t) {
        x[t + 3] = c.x[(first + t) * c.pitch() + channel];
      }
      for (size_t t = 0; t < length; ++t) {
        double y = 0.0;
        for (size_t j = 0; j < 4; ++j) {
          y += w[j] * x[t + j];
        }
        const double sigma = sigmoid64(y);
        ref.out[(first + t) * c.pitch() + channel] = y * sigma;
        const double dy = c.g[(first + t) * c.pitch() + channel] * sigma * (1.0 + y * (1.0 - sigma));
        for (size_t j = 0; j < 4; ++j) {
          d_x[t + j] += w[j] * dy;
          ref.d_w[channel * 4 + j] += dy * x[t + j];
        }
      }
      for (size_t t = 0; t < length; ++t) {
        ref.d_x[(first + t) * c.pitch() + channel] = d_x[t + 3];
      }
      for (size_t i = 0; i < 3; ++i) {
        ref.d_state[(s * channels + channel) * 3 + i] = d_x[i];
      }
    }
  }
  return ref;
}

template <class T>
Outputs run(const Case& c, DType weight_dtype) {
  const int64_t tokens = c.pack.tokens(), sequences = c.pack.sequences();
  const auto pitch = static_cast<int64_t>(c.pitch());
  Mapped map(c.pack, bridge::kConvChunk);
  Buffer<T> x(c.x), state(c.state), g(c.g), out(c.x.size()), d_x(c.x.size());
  Buffer<T> d_state(static_cast<size_t>(sequences * c.channels) * 3);
  AnyBuffer w(c.w, weight_dtype), d_w(c.w.size(), weight_dtype);
  Buffer<float> workspace(bridge::conv_backward_workspace_bytes(tokens, sequences, c.channels) / sizeof(float));
  const void* before = c.state.empty() ? nullptr : state.data();
  launched(bridge::conv1d_silu_forward(
      {x.data(), w.data(), before, out.data(), map.chunks(), tokens, sequences, pitch, pitch, c.channels, dtype_of<T>, weight_dtype},
      nullptr));
  launched(bridge::conv1d_silu_backward({x.data(), w.data(), before, g.data(), d_x.data(), d_w.data(), d_state.data(), map.chunks(),
                                         map.first(), map.borders(), c.pack.wide, workspace.data(), tokens, sequences, pitch,
                                         pitch, pitch, c.channels, dtype_of<T>, weight_dtype},
                                        nullptr));
  return {{"out", out.values()}, {"d_x", d_x.values()}, {"d_weight", d_w.values()},
          {"d_state", d_state.values()}};
}

template <class T>
void compare(const Case& c, DType weight_dtype) {
  const Reference ref = reference(c);
  Outputs found = under_every_schedule([&] { return run<T>(c, weight_dtype); });
  const double tokens = static_cast<double>(c.pack.tokens());
  // A convolution adds terms that may cancel: float32 is exact to a few units of the largest one.
  close_slice("out", found["out"], ref.out, kOneRounding<T>, 2e-6);
  close_slice("d_x", found["d_x"], ref.d_x, kOneRounding<T>, 4e-6);
  close_elements("d_weight", found["d_weight"], ref.d_w, weight_dtype == DType::kF32 ? 1e-5 : kOneRounding<Bf16>,
                 1e-5 * std::sqrt(tokens + 1.0));
  close_elements("d_state", found["d_state"], ref.d_state, kOneRounding<T>, 4e-6);
}

template <class T>
void random_case(unsigned seed, const Pack& pack, int channels, int gap, bool state, DType weight_dtype) {
  context() = std::string("conv1d_silu ") + name_of<T>() + " pack " + pack.name + " channels " + std::to_string(channels);
  Random random(seed);
  Case c{pack, channels, gap, {}, {}, {}, {}};
  const size_t n = static_cast<size_t>(pack.tokens()) * c.pitch();
  c.x = stored<T>(random.normal(n));
  c.g = stored<T>(random.normal(n));
  c.w = stored(random.normal(static_cast<size_t>(channels) * 4, 0.5), weight_dtype);
  if (state) {
    c.state = stored<T>(random.normal(static_cast<size_t>(pack.sequences() * channels) * 3));
  }
  compare<T>(c, weight_dtype);
}

// [batch, channels, seq] of a golden as [batch * seq, 16], the missing channels zero.
Values by_token(const Golden& golden) {
  const auto batch = static_cast<size_t>(golden.shape[0]), channels = static_cast<size_t>(golden.shape[1]),
             seq = static_cast<size_t>(golden.shape[2]);
  Values out(batch * seq * 16);
  for (size_t b = 0; b < batch; ++b) {
    for (size_t channel = 0; channel < channels; ++channel) {
      for (size_t t = 0; t < seq; ++t) {
        out[(b * seq + t) * 16 + channel] = golden.values[(b * channels + channel) * seq + t];
      }
    }
  }
  return out;
}

// [.., 12, width] as [.., 16, width].
Values widened(const Values& values, size_t width) { return spaced(values, 12 * width, 4 * width, 0.0); }

void golden_cases(const Goldens& goldens) {
  for (const std::string name : {"conv1d_silu", "conv1d_silu_short", "conv1d_silu_state", "conv1d_silu_packed"}) {
    context() = name + " golden";
    const Golden& x = goldens.at(name + ".in.x");
    const Pack pack{"golden", lengths_of(goldens, name, x.shape[0], x.shape[2]), 0, false};
    Case c{pack, 16, 0, by_token(x), widened(goldens.at(name + ".in.weight").values, 4), {}, by_token(goldens.at(name + ".up.out"))};
    if (goldens.has(name + ".in.state")) {
      c.state = widened(goldens.at(name + ".in.state").values, 3);
    }
    const Reference ref = reference(c);
    Outputs found = under_every_schedule([&] { return run<float>(c, DType::kF32); });
    const auto both = [&](const char* what, const Values& reference, const Values& expected, double tolerance) {
      close_norm((std::string("reference ") + what).c_str(), reference, expected, 1e-7);
      close_norm(what, found[what], expected, tolerance);
    };
    both("out", ref.out, by_token(goldens.at(name + ".out.out")), 2e-6);
    both("d_x", ref.d_x, by_token(goldens.at(name + ".grad.x")), 5e-6);
    both("d_weight", ref.d_w, widened(goldens.at(name + ".grad.weight").values, 4), 5e-6);
    if (!c.state.empty()) {
      both("d_state", ref.d_state, widened(goldens.at(name + ".grad.state").values, 3), 5e-6);
    }
  }
}

// Every token in one chunk, chunks in order, none across a border.
void chunk_maps() {
  std::vector<Pack> all = packs();
  Pack hundreds{"hundreds", {}, 5, true};
  for (int i = 0; i < 2500; ++i) {
    hundreds.lengths.push_back(i % 7 == 3 ? 0 : i % 3);
  }
  all.push_back(hundreds);
  for (const Pack& pack : all) {
    context() = std::string("chunk map of ") + pack.name;
    emulation::set_schedule(emulation::Schedule::kShuffled, 3);
    Mapped map(pack, 64);
    const Values borders = pack.borders();
    size_t at = 0;
    for (size_t s = 0; s <= pack.lengths.size(); ++s) {
      const int length = s < pack.lengths.size() ? pack.lengths[s] : pack.tail;
      require(map.first()[s] == static_cast<int>(at), "first_chunk is the number of chunks before");
      for (int position = 0; position < length; position += 64) {
        const bridge::Chunk& chunk = map.chunks()[at++];
        require(chunk.sequence == static_cast<int>(s) && chunk.position == position &&
                    chunk.first == static_cast<int>(borders[s]) + position && chunk.tokens == std::min(64, length - position),
                "a chunk is the next 64 tokens of its sequence");
      }
    }
    require(map.first()[pack.lengths.size() + 1] == static_cast<int>(at), "first_chunk ends with the count");
    for (; at < map.size(); ++at) {
      require(map.chunks()[at].sequence == -1 && map.chunks()[at].tokens == 0, "entries behind the last chunk are empty");
    }
  }
}

void refusals() {
  context() = "conv1d_silu refusals";
  bridge::ConvForward p{};
  p.tokens = 1;
  p.dtype = DType::kBf16;
  p.channels = 12;
  require(bridge::conv1d_silu_forward(p, nullptr) == cudaErrorInvalidValue, "channels in half pieces are refused");
  p.channels = 16;
  p.x_stride = 17;
  require(bridge::conv1d_silu_forward(p, nullptr) == cudaErrorInvalidValue, "an unaligned stride is refused");
}

}  // namespace

int main(int, char** arguments) {
  chunk_maps();
  golden_cases(Goldens(std::string(arguments[1]) + "/ops.safetensors"));
  unsigned seed = 1;
  for (const Pack& pack : packs()) {
    random_case<float>(seed, pack, 72, 8, seed % 2 == 0, DType::kF32);
    random_case<Bf16>(seed, pack, 136, 8, seed % 2 == 1, seed % 3 == 0 ? DType::kF32 : DType::kBf16);
    ++seed;
  }
  random_case<Bf16>(seed, {"1000", {1000}, 0, false}, 16, 0, false, DType::kBf16);
  refusals();
  return finish("conv1d_silu");
}
