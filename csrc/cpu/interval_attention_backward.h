// Backward pass of attention under intervals: a chunk of keys past the query panels that see it.
//
//   weight = exp(score - lse)    delta = sum(grad_out * out) - grad_lse
//   grad_score = weight * (grad_out . v - delta)
//   grad_q = scale * sum over keys of grad_score * k    grad_k = scale * sum over lines of ... * q
//   grad_v = sum over lines of weight * grad_out
#pragma once

#include "cpu/interval_attention_tiles.h"

namespace dlm_fast::cpu {

template <class V>
struct AttentionBackwardChunk {
  using Tiles = AttentionTiles<V>;
  using Gemm = typename Tiles::Gemm;
  using Real = typename V::Real;
  using Part = typename Tiles::Part;
  static constexpr int kLanes = Tiles::kLanes;
  static constexpr int kPanel = Tiles::kPanel;
  static constexpr int kTile = Tiles::kTile;

  struct Tile {
    Real *key_strips, *value_strips, *key_rows;  // copies of the inputs
    Real *grad_key, *grad_value;                 // [column panel][key][P]
    OddRows<Real> odd_keys;
  };

  const AttentionBackward& call;
  const IntervalAttentionInputs& in;
  const int64_t head, first_tile, width;
  Real* query_panels;
  Tile tiles[kChunkTiles];
  int64_t num_tiles;
  Real *weights, *grad_scores;             // [key][P]
  Real *query, *grad_out;                  // [d][P]
  Real *query_columns, *grad_out_columns;  // [column panel][line][P]
  OddRows<Real> odd_queries, odd_grad_outs;
  Real lse[kPanel], delta[kPanel];

  AttentionBackwardChunk(const AttentionBackward& c, int64_t key_head, int64_t chunk, Real* queries)
      : call(c),
        in(c.inputs),
        head(key_head),
        first_tile(chunk * kChunkTiles),
        width(in.width),
        query_panels(queries) {
    const int64_t all_tiles = (in.num_keys + kKeyTile - 1) / kKeyTile;
    num_tiles = std::min(kChunkTiles, all_tiles - first_tile);
    const int64_t strips = round_up(Tiles::strips_size(width), 16);
    const int64_t rows = round_up(Tiles::rows_size(width), 16);
    const int64_t columns = Tiles::column_panels(width) * kPanel;
    const int64_t tile_size = 2 * strips + rows + 2 * kKeyTile * columns;
    Real* memory = thread_scratch<Real>(kChunkTiles * tile_size + 2 * kKeyTile * kPanel +
                                        2 * width * kPanel + 2 * columns * kPanel);
    for (Tile& tile : tiles) {
      tile.key_strips = memory;
      tile.value_strips = memory + strips;
      tile.key_rows = memory + 2 * strips;
      tile.grad_key = memory + 2 * strips + rows;
      tile.grad_value = tile.grad_key + kKeyTile * columns;
      memory += tile_size;
    }
    weights = memory;
    grad_scores = weights + kKeyTile * kPanel;
    query = grad_scores + kKeyTile * kPanel;
    grad_out = query + width * kPanel;
    query_columns = grad_out + width * kPanel;
    grad_out_columns = query_columns + columns * kPanel;
  }

  void run() {
    for (int64_t t = 0; t < num_tiles; ++t) pack(t);
    const auto range = call.plan.panels_of(first_tile, kChunkTiles);
    for (int64_t panel = range.first; panel < range.last; ++panel) {
      const auto entries = call.plan.entries(panel, first_tile, kChunkTiles);
      if (entries.empty()) continue;
      load(panel);
      Real* grad_query = query_panels + panel * width * kPanel;
      std::fill_n(grad_query, width * kPanel, Real(0));
      for (const TileEntry& entry : entries) {
        const Part part(call.plan, panel, entry);
        Tile& tile = tiles[entry.tile - first_tile];
        if (call.plan.lines_of(panel) <= kLanes)
          meet<1>(tile, part, call.plan.lines_of(panel), grad_query);
        else
          meet<2>(tile, part, call.plan.lines_of(panel), grad_query);
      }
      const V scale = V::set(static_cast<Real>(in.scale));
      for (int64_t i = 0; i < width * kPanel; i += kLanes)
        (scale * V::load(grad_query + i)).store(grad_query + i);
    }
    for (int64_t t = 0; t < num_tiles; ++t) {
      write(tiles[t].grad_key, t, static_cast<Real>(in.scale), call.gradients.k);
      write(tiles[t].grad_value, t, Real(1), call.gradients.v);
    }
  }

  int64_t keys_of(int64_t tile) const {
    return std::min(kKeyTile, in.num_keys - (first_tile + tile) * kKeyTile);
  }

  void pack(int64_t t) {
    Tile& tile = tiles[t];
    const int64_t first = (first_tile + t) * kKeyTile, count = keys_of(t);
    const Matrix keys = Tiles::tile_rows(in, in.k, head, first);
    Tiles::pack_strips(keys, count, tile.key_strips);
    Tiles::pack_strips(Tiles::tile_rows(in, in.v, head, first), count, tile.value_strips);
    Tiles::copy_rows(keys, count, tile.key_rows, tile.odd_keys);
    const int64_t columns = Tiles::column_panels(width) * kPanel;
    std::fill_n(tile.grad_key, kKeyTile * columns, Real(0));
    std::fill_n(tile.grad_value, kKeyTile * columns, Real(0));
  }

  void load(int64_t panel) {
    const int64_t lines = call.plan.lines_of(panel);
    load_rows(in.q, panel, query, query_columns, odd_queries);
    load_rows(call.cotangents.grad_out, panel, grad_out, grad_out_columns, odd_grad_outs);
    const V scale = V::set(static_cast<Real>(in.scale));
    for (int64_t i = 0; i < width * kPanel; i += kLanes)
      (scale * V::load(query + i)).store(query + i);
    int64_t rows[kPanel];
    Tiles::line_offsets(in, call.plan, head, panel, in.query_heads, 1, rows);
    for (int64_t i = 0; i < kPanel; ++i) {
      lse[i] = i < lines ? static_cast<const Real*>(call.cotangents.lse)[rows[i]] : Real(0);
      delta[i] = i < lines ? static_cast<const Real*>(call.delta)[rows[i]] : Real(0);
    }
  }

  void load_rows(const AttentionRows& rows, int64_t panel, Real* turned, Real* columns,
                 OddRows<Real>& odd) {
    int64_t offsets[kPanel];
    Tiles::line_offsets(in, call.plan, head, panel, rows.row_stride, rows.head_stride, offsets);
    const Matrix matrix = Tiles::matrix_of(rows, width, in.dtype);
    Gemm::pack_rows(matrix, offsets, kPanel, turned);
    Tiles::pack_columns(matrix, offsets, kPanel, columns, odd);
  }

  template <int kVectors>
  void meet(Tile& tile, const Part& part, int64_t lines, Real* grad_query) {
    if (part.masked)
      score<kVectors, true>(tile, part);
    else
      score<kVectors, false>(tile, part);
    V one[kVectors];
    for (V& factor : one) factor = V::set(1);
    Tiles::over_keys(tile.key_rows, width, grad_scores, part, one, grad_query);
    Tiles::over_lines(grad_scores, query_columns, width, lines, part, tile.grad_key);
    Tiles::over_lines(weights, grad_out_columns, width, lines, part, tile.grad_value);
    if (!tile.odd_keys.index.empty())
      Tiles::add_odd_keys(tile.odd_keys, width, grad_scores, part, grad_query);
    if (!odd_queries.index.empty())
      Tiles::add_odd_lines(odd_queries, width, grad_scores, part, tile.grad_key);
    if (!odd_grad_outs.index.empty())
      Tiles::add_odd_lines(odd_grad_outs, width, weights, part, tile.grad_value);
  }

  // Weights and gradients of the scores; exactly zero where a line does not see the key.
  template <int kVectors, bool kMasked>
  void score(const Tile& tile, const Part& part) {
    V shift[kVectors], mean[kVectors];
    for (int j = 0; j < kVectors; ++j) {
      shift[j] = V::load(lse + j * kLanes);
      mean[j] = V::load(delta + j * kLanes);
    }
    for (int64_t key = part.first; key < part.last; key += kTile) {
      V product[kTile][kVectors];
      Tiles::strip_product(tile.key_strips + key * width, query, width, product);
      // Stored before the exponentials: all of them at once would not fit into the registers.
      Gemm::put(product, kTile, false, weights + key * kPanel);
      Tiles::strip_product(tile.value_strips + key * width, grad_out, width, product);
      Gemm::put(product, kTile, false, grad_scores + key * kPanel);
    }
    for (int64_t key = part.first; key < part.last; ++key)
      for (int j = 0; j < kVectors; ++j) {
        Real* weight_place = weights + key * kPanel + j * kLanes;
        Real* grad_place = grad_scores + key * kPanel + j * kLanes;
        V weight = V::exp(V::load(weight_place) - shift[j]);
        V grad = weight * (V::load(grad_place) - mean[j]);
        if (kMasked) {
          const auto sees = V::lanes(part.bits[key] >> (j * kLanes));
          weight = V::select(sees, weight, V::set(0));
          grad = V::select(sees, grad, V::set(0));
        }
        weight.store(weight_place);
        grad.store(grad_place);
      }
  }

  void write(const Real* sums, int64_t t, Real scale, void* gradients) {
    const int64_t first = (first_tile + t) * kKeyTile;
    for (int64_t key = 0; key < keys_of(t); ++key) {
      Real* out = static_cast<Real*>(gradients) + ((first + key) * in.key_heads + head) * width;
      for (int64_t c = 0; c < Tiles::column_panels(width); ++c) {
        const Real* row = sums + (c * kKeyTile + key) * kPanel;
        const int64_t count = std::min<int64_t>(kPanel, width - c * kPanel);
        for (int64_t d = 0; d < count; ++d) out[c * kPanel + d] = scale * row[d];
      }
    }
  }

  static void add_queries(const AttentionBackward& call, int64_t head, int64_t chunk,
                          const Real* query_panels) {
    const IntervalAttentionInputs& in = call.inputs;
    const auto range = call.plan.panels_of(chunk * kChunkTiles, kChunkTiles);
    for (int64_t panel = range.first; panel < range.last; ++panel) {
      if (call.plan.entries(panel, chunk * kChunkTiles, kChunkTiles).empty()) continue;
      int64_t offsets[kPanel];
      Tiles::line_offsets(in, call.plan, head, panel, in.query_heads * in.width, in.width, offsets);
      Gemm::add_rows(query_panels + panel * in.width * kPanel, in.width, offsets,
                     call.plan.lines_of(panel), 1, static_cast<Real*>(call.gradients.q));
    }
  }

  static void find_delta(const AttentionBackward& call, int64_t row) {
    const IntervalAttentionInputs& in = call.inputs;
    const AttentionRows &out = call.cotangents.out, &grad = call.cotangents.grad_out;
    for (int64_t h = 0; h < in.query_heads; ++h) {
      V sum = V::set(0);
      for (int64_t d = 0; d < in.width; d += kLanes) {
        const int64_t count = in.width - d;
        sum = V::fma(Gemm::read_vector(out.data, in.dtype,
                                       row * out.row_stride + h * out.head_stride + d, count),
                     Gemm::read_vector(grad.data, in.dtype,
                                       row * grad.row_stride + h * grad.head_stride + d, count),
                     sum);
      }
      const int64_t i = row * in.query_heads + h;
      const void* lse = call.cotangents.grad_lse;
      static_cast<Real*>(call.delta)[i] =
          V::reduce(sum) - (lse ? static_cast<const Real*>(lse)[i] : Real(0));
    }
  }
};

}  // namespace dlm_fast::cpu
