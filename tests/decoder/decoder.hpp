// Decodes a bundle, written from docs/bundle.md alone: dense, hash, unified and qr, in every precision.
// (A decoder for production also compares every file with its sha256, as the page says.)
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

using std::map, std::string, std::vector;
using Floats = vector<float>;

// ---- JSON: numbers stay text until they are used, since seeds need all 64 bits ----
struct Json {
    enum { Null, Scalar, Text, List, Object } kind = Null;
    string text;
    vector<Json> list;
    map<string, Json> object;
    const Json& operator[](const string& key) const { return object.at(key); }
    const Json& operator[](size_t i) const { return list.at(i); }
    int64_t integer() const { return std::stoll(text); }
};

struct Parser {
    const string& s;
    size_t at = 0;
    char next() {
        while (at < s.size() && isspace(static_cast<unsigned char>(s[at]))) ++at;
        return at < s.size() ? s[at] : throw std::runtime_error("JSON ends early");
    }
    void expect(char c) {
        if (next() != c) throw std::runtime_error(string("JSON lacks ") + c);
        ++at;
    }
    string quoted() {
        string out;
        for (expect('"'); s.at(at) != '"'; ++at) {
            if (s[at] != '\\') { out += s[at]; continue; }
            char c = s.at(++at);
            static const map<char, char> plain{{'n', '\n'}, {'t', '\t'}, {'r', '\r'}, {'b', '\b'}, {'f', '\f'}};
            if (c != 'u') { out += plain.count(c) ? plain.at(c) : c; continue; }
            out += char(std::stoul(s.substr(at + 1, 4), nullptr, 16));  // only control characters are written so
            at += 4;
        }
        ++at;
        return out;
    }
    Json value() {
        Json v;
        char c = next();
        if (c == '"') { v.kind = Json::Text; v.text = quoted(); return v; }
        if (c == '{' || c == '[') {
            char close = c == '{' ? '}' : ']';
            v.kind = c == '{' ? Json::Object : Json::List;
            for (++at; next() != close; next() == ',' ? void(++at) : void()) {
                if (c == '[') { v.list.push_back(value()); continue; }
                string key = quoted();
                expect(':');
                v.object[key] = value();
            }
            ++at;
            return v;
        }
        size_t end = s.find_first_of(",]} \n\r\t", at);
        v.text = s.substr(at, end - at);
        v.kind = v.text == "null" ? Json::Null : Json::Scalar;
        at = end;
        return v;
    }
};

string read(const string& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) throw std::runtime_error(path + ": cannot be read");
    return {std::istreambuf_iterator<char>(file), {}};
}

// ---- safetensors: eight bytes of header length, the header, the tensors ----
struct Tensor {
    const char* data;
    int64_t rows, columns;  // a vector has one column
    template <class T> T get(int64_t i) const { T value; memcpy(&value, data + i * sizeof(T), sizeof(T)); return value; }
};

struct File {
    string bytes;
    map<string, Tensor> tensors;
    explicit File(const string& path) : bytes(read(path)) {
        uint64_t length;
        memcpy(&length, bytes.data(), 8);
        string header = bytes.substr(8, length);
        for (auto& [name, entry] : Parser{header}.value().object) {
            if (name == "__metadata__") continue;
            const Json& shape = entry["shape"];
            int64_t columns = shape.list.size() > 1 ? shape[1].integer() : 1;
            tensors[name] = {bytes.data() + 8 + length + entry["data_offsets"][0].integer(), shape[0].integer(), columns};
        }
    }
};

float half(uint16_t h) {
    int exponent = h >> 10 & 31, fraction = h & 1023;
    float size = exponent ? std::ldexp(1024.0f + fraction, exponent - 25) : std::ldexp(float(fraction), -24);
    return h >> 15 ? -size : size;
}

// ---- the contract ----
int64_t hash_row(int64_t id, int64_t seed, int64_t num_rows) {
    uint64_t x = uint64_t(id) + uint64_t(seed);
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ x >> 27) * 0x94D049BB133111EBull;
    x ^= x >> 31;
    return int64_t((x >> 33) * uint64_t(num_rows) >> 31);
}

struct Bundle {
    string path;
    Json config;
    map<string, File> files;
    map<string, const Json*> tables;

    explicit Bundle(const string& folder) : path(folder) {
        string text = read(path + "/config.json");
        config = Parser{text}.value();
        if (config["format"].text != "embtab-bundle" || config["version"].integer() != 1) throw std::runtime_error("not a bundle of version 1");
        for (auto& [name, about] : config["files"].object)
            if (name.size() > 12 && name.substr(name.size() - 12) == ".safetensors") files.emplace(name, File(path + "/" + name));
        for (auto& table : config["plan"]["tables"].list) tables[table["name"].text] = &table;
    }
    const Tensor& tensor(const string& name) { return files.at(config["tensors"][name]["file"].text).tensors.at(name); }

    Floats row(const string& table, int64_t row) {
        const string& precision = (*tables.at(table))["precision"].text;
        int64_t width = (*tables.at(table))["width"].integer();
        const Tensor& stored = tensor("rows." + table);
        if (row < 0 || row >= stored.rows) throw std::runtime_error(table + ": no row " + std::to_string(row));
        Floats out(width);
        if (precision == "fp32" || precision == "fp16") {
            for (int64_t j = 0; j < width; ++j) out[j] = precision == "fp32" ? stored.get<float>(row * width + j) : half(stored.get<uint16_t>(row * width + j));
            return out;
        }
        float scale = half(tensor("scales." + table).get<uint16_t>(row)), offset = half(tensor("offsets." + table).get<uint16_t>(row));
        for (int64_t j = 0; j < width; ++j) {
            int q = stored.get<uint8_t>(row * stored.columns + (precision == "int4" ? j / 2 : j));
            if (precision == "int4") q = j % 2 ? q >> 4 : q & 15;
            out[j] = float(q) * scale + offset;
        }
        return out;
    }

    Floats vector_of(const Json& feature, int64_t id) {
        const Json& space = feature["id_space"];
        const Json& e = config["plan"]["encodings"][space.kind == Json::Null ? feature["name"].text : space.text];
        const string& method = e["method"].text;
        if (e["num_ids"].kind != Json::Null && (id < 0 || id >= e["num_ids"].integer())) throw std::runtime_error("id out of range");
        auto table = [&](size_t k) { return e["tables"][k].text; };
        if (method == "dense") return row(table(0), id);
        if (method == "hash") return row(table(0), hash_row(id, e["seed"].integer(), e["num_rows"].integer()));
        Floats out;
        if (method == "unified") {
            for (size_t k = 0; k < e["seeds"].list.size(); ++k)
                for (float x : row(table(k), hash_row(id, e["seeds"][k].integer(), e["num_rows"].integer()))) out.push_back(x);
            return out;
        }
        if (method != "qr") throw std::runtime_error("this decoder does not know method " + method);
        int64_t c = e["collisions"].integer();
        out = row(table(0), id / c);
        Floats r = row(table(1), id % c);
        const string& op = e["op"].text;
        if (op == "concat") out.insert(out.end(), r.begin(), r.end());
        else for (size_t j = 0; j < r.size(); ++j) out[j] = op == "sum" ? out[j] + r[j] : out[j] * r[j];
        return out;
    }
};
